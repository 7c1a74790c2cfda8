"""
Checkpoints that are whole or absent, and checked when they are read.
"""

import errno
import hashlib
import os
import pickle
import re
import struct
from concurrent.futures import ThreadPoolExecutor

import torch

from lib.common import UserError, atomic_write, say

NAME = re.compile(r"model_(\d{5,})\.pt")  # with the step; other names in the folder are other people's
COMMENT_LENGTH = struct.pack("<H", 64)  # of a sha256 in hexadecimal, as the last field of a zip archive
GONE = "is gone, and with it the run: start again, or put it back and resume"
KINDS = {"model": dict, "optimizer": dict, "config": dict, "train_config": dict, "step": int}  # of what it holds


class HashingWriter:
    """A file to write to that hashes with sha256 on a second core while the disk writes."""

    def __init__(self, file):
        self.file, self.flush, self.error = file, file.flush, None
        self.digest, self.thread = hashlib.sha256(), ThreadPoolExecutor(1)

    def write(self, data):
        hashed = self.thread.submit(self.digest.update, data)
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error  # torch raises a RuntimeError that does not say why
            raise
        finally:
            hashed.result()  # torch may free the data after a failure
        return len(data)


def step_of(path):
    return int(NAME.fullmatch(path.name)[1])


def list_checkpoints(log_dir):
    """The checkpoints in a folder, by their steps."""
    return sorted((path for path in log_dir.iterdir() if NAME.fullmatch(path.name) and path.is_file()), key=step_of)


def write_checkpoint(path, contents):
    """Write a dict of plain data and tensors to path, whole or not at all. Raises OSError where that fails.

    At its end stands its sha256, as the comment of the zip archive that it is: torch.load checks nothing.
    """
    with atomic_write(path) as file:
        hashing = HashingWriter(file)
        torch.serialization.set_crc32_options(False)  # a weaker sum than ours, which torch.load does not look at
        try:
            torch.save(contents, hashing)
        except RuntimeError as error:
            raise hashing.error or error from None
        file.seek(-2, os.SEEK_CUR)  # torch wrote a comment length of 0
        file.write(COMMENT_LENGTH + hashing.digest.hexdigest().encode())


def remove(path):
    try:
        path.unlink()
    except OSError as error:
        say(f"warning: {path} cannot be removed: {error}")


def save_checkpoint(log_dir, contents, keep, prune=True):
    """Write log_dir/model_{step:05d}.pt, then remove all but the newest `keep` up to it, where `prune` says so.

    On a full disk the oldest spare one makes room, where `prune` allows it. Returns False, having said so, where it
    could not be written; the newest of the older ones is intact then. Raises UserError where the folder is gone.
    """
    step = contents["step"]
    path = log_dir / f"model_{step:05d}.pt"
    for retry in (False, True):
        try:
            write_checkpoint(path, contents)
            break
        except (OSError, RuntimeError) as error:
            if not log_dir.is_dir():
                raise UserError(f"{log_dir}/ {GONE}") from None
            older = [other for other in list_checkpoints(log_dir) if step_of(other) < step]
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if retry or not full or not prune or len(older) < 2:
                say(f"WARNING: {path} COULD NOT BE SAVED, the older checkpoints are intact: {error}")
                return False
            say(f"warning: the disk is full: removing {older[0]} to make room for {path.name}")
            remove(older[0])
    if prune:
        for old in [other for other in list_checkpoints(log_dir) if step_of(other) <= step][:-keep]:
            remove(old)
    say(f"step {step:5d} | saved {path}")
    return True


def load_checkpoint(path, mmap=False):
    """Read a checkpoint onto the CPU, as a dict with at least KINDS; with mmap, a machine's ranks share its memory.

    Raises UserError where it is damaged or none.
    """
    try:
        with open(path, "rb") as file:
            size, digest = max(0, file.seek(0, os.SEEK_END) - 66), hashlib.sha256()
            file.seek(0)
            while chunk := file.read(min(1 << 20, size - file.tell())):
                digest.update(chunk)
            digest.update(bytes(2))  # the comment length that torch wrote
            if file.read() != COMMENT_LENGTH + digest.hexdigest().encode():
                raise UserError(f"{path} is damaged, or no checkpoint of train_gpt2.py: its sha256 does not match")
        # weights_only, since other pickles could run anything
        contents = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot load {path}: {error}") from None
    for name, kind in KINDS.items():
        if not isinstance(contents, dict) or not isinstance(contents.get(name), kind):
            raise UserError(f"{path} is no checkpoint of train_gpt2.py: its {name} is not a {kind.__name__}")
    return contents


def newest_whole_checkpoint(log_dir):
    """The path of the newest checkpoint that can be read, None where there are none. Names those that cannot."""
    paths = list_checkpoints(log_dir)[::-1]
    for path in paths:
        try:
            load_checkpoint(path)
            return path
        except UserError as error:
            say(f"warning: {error}; falling back to the checkpoint before it")
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {log_dir}/ is whole: restore one from a backup")
    return None


def set_aside(log_dir, first_step):
    """Rename the checkpoints from a step on, so that no resume takes them; return the newest of the others or None."""
    paths = list_checkpoints(log_dir)
    for path in paths:
        if step_of(path) >= first_step:
            os.replace(path, path.with_suffix(".pt.not_finite"))
    return next((path for path in reversed(paths) if step_of(path) < first_step), None)
