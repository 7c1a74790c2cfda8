"""Build shards, and kill this process just before it gives the nth file its final name: kill_at_rename.py n FLAGS."""

import os
import signal
import sys

import fineweb

renames, replace = [], os.replace


def replace_or_die(source, target):
    renames.append(target)
    if len(renames) == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)


if __name__ == "__main__":
    number = sys.argv.pop(1)
    os.replace = replace_or_die
    fineweb.main()
