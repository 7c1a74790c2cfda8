"""Run a script where no folder can be synced, as on many network disks: unsynced_folders.py SCRIPT FLAGS."""

import errno
import os
import runpy
import stat
import sys

fsync = os.fsync


def refuse_folders(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    fsync(descriptor)


if __name__ == "__main__":
    os.fsync = refuse_folders
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
