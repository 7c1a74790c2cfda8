"""Build shards, and check at every rename into the folder of --out that what is renamed has been synced to the disk."""

import os
import sys
from pathlib import Path

import fineweb

synced, fsync, replace = {}, os.fsync, os.replace  # inode -> size at its last fsync


def fsync_and_note(descriptor):
    fsync(descriptor)
    status = os.fstat(descriptor)
    synced[status.st_ino] = status.st_size


def check_and_replace(source, target):
    if Path(target).parent == Path(sys.argv[-1]):
        status = os.stat(source)
        assert synced.get(status.st_ino) == status.st_size, f"{target} was renamed before it was on the disk"
    replace(source, target)


if __name__ == "__main__":
    os.fsync, os.replace = fsync_and_note, check_and_replace
    fineweb.main()
