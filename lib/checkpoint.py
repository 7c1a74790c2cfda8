"""
The file of a checkpoint: complete or not there, plain data only, checked when it is read.
"""

import hashlib
import os
import pickle
import re
import shlex
import struct
from concurrent.futures import ThreadPoolExecutor

import torch

from lib.console import UserError
from lib.files import atomic_write

COMMENT_LENGTH = struct.pack("<H", 64)  # of a sha256 in hexadecimal, as the last field of a zip archive
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


def load_checkpoint(path, mmap=False):
    """Read a checkpoint onto the CPU, as a dict with at least KINDS; with mmap, a machine's ranks share its memory.

    Raises UserError where it is damaged or none.
    """
    try:
        with open(path, "rb") as file:
            size, digest = max(0, file.seek(0, os.SEEK_END) - 66), hashlib.sha256()
            file.seek(size)
            end = file.read()
            if not re.fullmatch(re.escape(COMMENT_LENGTH) + b"[0-9a-f]{64}", end):
                raise UserError(
                    f"{path} is not written by this trainer, or cut off: import it with python -m tools.import_model "
                    f"{shlex.quote(str(path))} FOLDER"
                )
            file.seek(0)
            while chunk := file.read(min(1 << 20, size - file.tell())):
                digest.update(chunk)
            digest.update(bytes(2))  # the comment length that torch wrote
            if end != COMMENT_LENGTH + digest.hexdigest().encode():
                raise UserError(f"{path} is damaged: its sha256 does not match. Copy it again, or take another one")
        # weights_only, since other pickles could run anything
        contents = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot load {path}: {error}") from None
    for name, kind in KINDS.items():
        if not isinstance(contents, dict) or not isinstance(contents.get(name), kind):
            raise UserError(f"{path} is no checkpoint of train_gpt2.py: its {name} is not a {kind.__name__}")
    return contents
