"""Train; at the end rank 0 takes longer than collective_timeout, and rank 1 is signalled while it waits for that."""

import os
import signal
import time

import train_gpt2
from lib import distributed
from lib.run.folder import RunFolder

leave = RunFolder.__exit__
wait_for_all = distributed.wait_for_all
left = []


def leave_late(self, *error):
    leave(self, *error)
    left.append(self)
    if os.environ["RANK"] == "0":
        time.sleep(4)


def signalled():
    if left and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    wait_for_all()


RunFolder.__exit__ = leave_late
distributed.wait_for_all = signalled
train_gpt2.run_as_command(train_gpt2.main, train_gpt2.parse_args())
