"""Checkpoints: files written atomically, of plain data only, verified when they are read; those in a run's folder."""

import errno
import hashlib
import os
import pickle
import re
import shlex
import struct
from collections import OrderedDict

import torch

from lib.console import UserError, say
from lib.files import atomic_write, list_folder
from lib.foreign import recognize

NAME = re.compile(r"model_(\d{5,})\.pt")  # with the step; files of other names are left alone
COMMENT_LENGTH = struct.pack("<H", 64)  # of a hexadecimal sha256; a zip archive's last field
REQUIRED = {"model": dict, "optimizer": dict, "config": dict, "train_config": dict, "step": int}  # entries
SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)
TENSORS = (torch.Tensor, torch.nn.Parameter)

# -----------------------------------------------------------------------------
# One file


def check_plain(value, name):
    """Raise UserError, with the name of the entry, for what torch.load(weights_only=True) would not give back whole:
    objects, numpy's numbers, tensors of which each rank has a part."""
    if type(value) in (dict, OrderedDict):
        for key, part in value.items():
            check_plain(key, f"a key of {name}")
            check_plain(part, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for place, part in enumerate(value):
            check_plain(part, f"{name}[{place}]")
    elif type(value) not in SCALARS + TENSORS:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise UserError(f"{name} is of type {kind}: checkpoints hold dicts, lists, numbers, strings and whole tensors")


class HashingWriter:
    """A writable file that computes its sha256, and remembers an OSError, of which torch does not say the reason."""

    def __init__(self, file):
        self.file = file
        self.flush = file.flush
        self.digest = hashlib.sha256()
        self.error = None

    def write(self, data):
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


def write_checkpoint(path, contents):
    """Atomically write a dict of plain data and tensors to path. Its sha256 follows as the comment of the zip archive,
    since torch.load verifies nothing. Raises OSError if that fails, and UserError for what could not be read again."""
    for name, value in contents.items():
        check_plain(value, name)
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
    """Load a checkpoint onto the CPU, as a dict with the entries of REQUIRED and more; with mmap, the ranks of a
    machine share its memory. Raises UserError if it is damaged or not a checkpoint."""
    try:
        with open(path, "rb") as file:
            left = file.seek(0, os.SEEK_END) - 66  # bytes before the comment
            file.seek(max(0, left))
            end = file.read()
            if not re.fullmatch(re.escape(COMMENT_LENGTH) + b"[0-9a-f]{64}", end):
                command = f"python -m tools.import_model {shlex.quote(str(path))} FOLDER"
                what = recognize(path) or f": restore it, or, if another program wrote it, import it with {command}"
                raise UserError(f"{path} is truncated, or was not written by this trainer{what}")
            file.seek(0)
            digest = hashlib.sha256()
            for start in range(0, left, 1 << 20):
                digest.update(file.read(min(1 << 20, left - start)))
        digest.update(bytes(2))  # the comment length that torch wrote
        if end != COMMENT_LENGTH + digest.hexdigest().encode():
            raise UserError(f"{path} is damaged: its sha256 does not match. Copy it again, or use another one")
        # weights_only: any other pickle could run arbitrary code
        contents = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot load {path}: {error}") from None
    for name, kind in REQUIRED.items():
        if not isinstance(contents, dict) or not isinstance(contents.get(name), kind):
            raise UserError(f"{path} is not a checkpoint of train_gpt2.py: its {name} is not a {kind.__name__}")
    return contents


# -----------------------------------------------------------------------------
# The checkpoints of a run


def path_of(log_dir, step):
    return log_dir / f"model_{step:05d}.pt"


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


def remove(path):
    try:
        path.unlink()
    except OSError as error:
        say(f"warning: {path} cannot be removed: {error}")


def save_checkpoint(log_dir, contents, keep):
    """Write log_dir/model_{step:05d}.pt, then remove all but the newest `keep` up to this step; None: keep all. If the
    disk is full, the oldest spare one is removed to make room. Returns the path, or False, with a warning, if it could
    not be written. Raises UserError for what could not be read again."""
    step = contents["step"]
    path = path_of(log_dir, step)
    for retry in (False, True):
        try:
            write_checkpoint(path, contents)
            break
        except (OSError, RuntimeError) as error:
            older = [other for other in list_checkpoints(log_dir) if step_of(other) < step]
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if retry or not full or not keep or len(older) < 2:
                say(f"WARNING: {path} COULD NOT BE SAVED: {error}")
                return False
            say(f"warning: the disk is full: removing {older[0]} to make room for {path.name}")
            remove(older[0])
    if keep:
        for old in [other for other in list_checkpoints(log_dir) if step_of(other) <= step][:-keep]:
            remove(old)
    say(f"step {step:5d} | saved {path}")
    return path


def newest_whole_checkpoint(log_dir, mmap=False):
    """(path, contents) of the newest checkpoint that loads, (None, None) if there are none. Warns of newer ones."""
    paths = list_checkpoints(log_dir)[::-1]
    for path in paths:
        try:
            return path, load_checkpoint(path, mmap)
        except UserError as error:
            say(f"warning: {error}; falling back to the checkpoint before it")
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {log_dir}/ can be loaded: restore one from a backup")
    return None, None


def set_aside(log_dir, first_step):
    """Rename the checkpoints from first_step on, so that no resume uses them. Returns the newest remaining one."""
    for path in list_checkpoints(log_dir):
        if step_of(path) >= first_step:
            os.replace(path, path.with_suffix(".pt.not_finite"))
    return next(reversed(list_checkpoints(log_dir)), None)
