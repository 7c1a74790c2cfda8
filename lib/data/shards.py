"""Token shards: the names of the files, their formats, and their tokens."""

import functools
import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.console import UserError
from lib.foreign import recognize

SPLITS = ("train", "val")
# llm.c stores small data sets as one .bin per split, without a number; macOS adds a ._NAME for each file of an archive
SHARD_NAME = re.compile(r"(?P<name>[^.].*)_(?P<split>train|val)(_\d{6}\.(npy|bin)|\.bin)")
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"


def name_shard(source, index):
    """The name of a shard made from a source, without its suffix. The first one is the validation split."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(source).name.split(".")[0]).strip("-") or "text"
    return f"{'edufineweb' if source == FINEWEB_EDU else name}_{'train' if index else 'val'}_{index:06d}"


def split_of(name):
    """ "train" or "val" for the name of a shard, None for any other name."""
    match = SHARD_NAME.fullmatch(name)
    return match and match["split"]


@functools.lru_cache(maxsize=128)  # a process may have 256 files open on macOS
class OpenFile:
    """A file that is open until this object is gone."""

    def __init__(self, path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close):
        if hasattr(self, "number"):
            close(self.number)


class Shard(NamedTuple):
    """The tokens of a shard, read when they are needed. With a memory map, a file that is truncated during the run
    would end the process with SIGBUS; here it is an error that names the file."""

    path: str
    offset: int  # bytes before the first token
    length: int  # tokens
    fingerprint: str  # hash of evenly spread pieces of 256 tokens: detects other content of the same length

    @classmethod
    def open(cls, path):
        """Open a .npy of one-dimensional uint16, or llm.c's .bin (a header of 256 int32, then uint16). Raises UserError
        if it is not complete."""
        try:
            with open(path, "rb") as file:
                offset, length = (read_npy_header if str(path).endswith(".npy") else read_bin_header)(file)
                expected = offset + 2 * length
                if (size := file.seek(0, os.SEEK_END)) != expected or length == 0:
                    raise ValueError(f"{size:,} bytes, where {length:,} tokens need {expected:,}")
                starts = [max(0, length - 256) * i // 15 for i in range(16)]
                sample = b"".join(os.pread(file.fileno(), 512, offset + 2 * start) for start in starts)
        except ValueError as error:
            remedy = recognize(path) or ". Fetch or build it again"
            raise UserError(f"{path} is not a complete token shard: {error}{remedy}") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}. Restore it, or build it again") from None
        return cls(str(path), offset, length, hashlib.sha256(sample).hexdigest()[:16])

    def read(self, start, end):
        """The tokens from start to end, or to the shard's end if that comes first, as uint16."""
        end = min(end, self.length)
        try:
            data = os.pread(OpenFile(self.path).number, 2 * (end - start), self.offset + 2 * start)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error}. Restore it, and resume") from None
        if len(data) < 2 * (end - start):
            raise UserError(f"{self.path} was truncated (fewer than {end} tokens): restore it, and resume")
        return np.frombuffer(data, "<u2")


def read_npy_header(file):
    """Return (bytes before the first token, tokens). Raises ValueError for other arrays."""
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.dtype("<u2") or len(shape) != 1:
        raise ValueError(f"it has dtype {dtype} and shape {shape}, not uint16 in one dimension")
    return file.tell(), shape[0]


def read_bin_header(file):
    """The same for a .bin."""
    header = np.frombuffer(file.read(1024), "<i4")
    if len(header) < 256 or tuple(header[:2]) != (20240520, 1):
        raise ValueError(f"its header {header[:3]} should begin with 20240520, 1 and the number of tokens")
    return 1024, int(header[2])
