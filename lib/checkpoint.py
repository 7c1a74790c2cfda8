"""
Checkpoint files: written atomically, plain data only, verified when they are read.
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
from lib.files import atomic_write, list_folder

COMMENT_LENGTH = struct.pack("<H", 64)  # of a hexadecimal sha256; a zip archive's last field
NAME = re.compile(r"model_(\d{5,})\.pt")  # with the step; files of other names are left alone
KINDS = {"model": dict, "optimizer": dict, "config": dict, "train_config": dict, "step": int}  # required entries


def step_of(path):
    return int(NAME.fullmatch(path.name)[1])


def list_checkpoints(log_dir):
    """The checkpoints in a folder, in the order of their steps."""
    paths = [path for path in list_folder(log_dir) if NAME.fullmatch(path.name) and os.path.isfile(path)]
    return sorted(paths, key=step_of)


def newest_checkpoint(path):
    """The newest checkpoint in a log_dir, by its name; any other path stays as it is."""
    newest = list_checkpoints(path)[-1:] if os.path.isdir(path) else []
    return str(newest[0]) if newest else path


class HashingWriter:
    """A writable file that computes its sha256 in a second thread while the disk writes."""

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
    """Atomically write a dict of plain data and tensors to path. Raises OSError if that fails.

    The sha256 follows as the comment of the zip archive, since torch.load verifies nothing.
    """
    with atomic_write(path) as file:
        hashing = HashingWriter(file)
        torch.serialization.set_crc32_options(False)  # weaker than our sha256, and torch.load ignores it
        try:
            torch.save(contents, hashing)
        except RuntimeError as error:
            raise hashing.error or error from None
        file.seek(-2, os.SEEK_CUR)  # torch wrote a comment length of 0
        file.write(COMMENT_LENGTH + hashing.digest.hexdigest().encode())


def load_checkpoint(path, mmap=False):
    """Load a checkpoint onto the CPU, as a dict with the entries of KINDS and more; with mmap, the ranks of a machine
    share its memory. Raises UserError if it is damaged or not a checkpoint.
    """
    try:
        with open(path, "rb") as file:
            size, digest = max(0, file.seek(0, os.SEEK_END) - 66), hashlib.sha256()
            file.seek(size)
            end = file.read()
            if not re.fullmatch(re.escape(COMMENT_LENGTH) + b"[0-9a-f]{64}", end):
                raise UserError(
                    f"{path} was not written by this trainer, or is truncated: import it with python -m "
                    f"tools.import_model {shlex.quote(str(path))} FOLDER"
                )
            file.seek(0)
            while chunk := file.read(min(1 << 20, size - file.tell())):
                digest.update(chunk)
            digest.update(bytes(2))  # the comment length that torch wrote
            if end != COMMENT_LENGTH + digest.hexdigest().encode():
                raise UserError(f"{path} is damaged: its sha256 does not match. Copy it again, or use another one")
        # weights_only: any other pickle could run arbitrary code
        contents = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot load {path}: {error}") from None
    for name, kind in KINDS.items():
        if not isinstance(contents, dict) or not isinstance(contents.get(name), kind):
            raise UserError(f"{path} is not a checkpoint of train_gpt2.py: its {name} is not a {kind.__name__}")
    return contents
