"""
The shards as a run reads them: one stream of tokens, opened in no time, checked where it is used.
"""

import functools
import hashlib

import numpy as np

from lib.common import UserError
from lib.shards import find_shards, open_shard, read_manifest

NPY_HEADER = 128  # bytes, as fineweb.py and numpy write it


@functools.lru_cache(maxsize=256)  # a process may have some 1,000 files open
def open_file(path):
    return open(path, "rb", buffering=0)


class TokenFile:
    """The tokens of a shard, read when they are needed. A memory map would end the process with SIGBUS where a file is
    cut short while the run reads it; here it is an error with a name. Raises UserError for what is no whole shard."""

    def __init__(self, path):
        self.path, self.offset, self.length = path, NPY_HEADER, (path.stat().st_size - NPY_HEADER) // 2
        shape = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({self.length},), }}"
        expected = b"\x93NUMPY\x01\x00v\x00" + shape.encode().ljust(NPY_HEADER - 11) + b"\n"
        with open(path, "rb", buffering=0) as file:
            as_expected = file.read(NPY_HEADER) == expected
        if not as_expected or self.length <= 0:  # a .bin shard, another version of the header, or a damaged file
            tokens = open_shard(path)
            self.offset, self.length = tokens.offset, len(tokens)

    def read(self, start, end):
        """The tokens from start to end, or to the shard's end where that comes first, as uint16."""
        end = min(end, self.length)
        try:
            file = open_file(self.path)
            file.seek(self.offset + 2 * start)
            tokens = np.frombuffer(file.read(2 * (end - start)), "<u2")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.path}: {error}. Put it back, and resume") from None
        if len(tokens) < end - start:
            raise UserError(f"{self.path} has become shorter than {end} tokens: put it back as it was, and resume")
        return tokens

    def fingerprint(self, pieces):
        """A hash of some pieces of 256 tokens, evenly spread: other content of this length is noticed at no cost."""
        starts = np.linspace(0, max(0, self.length - 256), pieces).astype(int).tolist()
        return hashlib.sha256(b"".join(self.read(start, start + 256).tobytes() for start in starts)).hexdigest()[:16]


class TokenStream:
    """The tokens of a split, shard after shard in name order."""

    def __init__(self, data_root, split, vocab_size=2**16):
        self.vocab_size = vocab_size
        self.shards = [TokenFile(path) for path in find_shards(data_root, split)]
        self.ends = np.cumsum([shard.length for shard in self.shards])  # where each one ends in the stream

    def __len__(self):
        return int(self.ends[-1])

    def read(self, start, end):
        """The tokens from start to end as uint16. Raises UserError for an id that is not below vocab_size: on CUDA it
        would end the process without a word."""
        pieces = []  # one, or several where it crosses from shard to shard
        while start < end:
            i = int(np.searchsorted(self.ends, start, side="right"))
            shard, begin = self.shards[i], int(self.ends[i]) - self.shards[i].length
            tokens = shard.read(start - begin, end - begin)
            if tokens.max() >= self.vocab_size:
                raise UserError(
                    f"{shard.path} has token id {tokens.max()} at offset {start - begin + tokens.argmax()}, not below "
                    f"vocab_size {self.vocab_size}: it is damaged or made with another tokenizer, build it again"
                )
            pieces.append(tokens)
            start += len(tokens)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def check(data_root, T, sequences):
    """Raise UserError where the shards are not whole, or hold less than the `sequences` of T tokens of a step. Returns
    what tells them from others: by name, the token count, the sha256 that a manifest has, a fingerprint."""
    open_file.cache_clear()  # of a run before in this process, whose shards another has replaced
    train, val = (TokenStream(data_root, split) for split in ("train", "val"))
    if (found := (len(train) - 1) // T) < sequences:
        raise UserError(
            f"{data_root}/ has {found} training sequences of {T} tokens, too few for one step of {sequences}: build "
            "more, or lower total_batch_size"
        )
    shards = train.shards + val.shards
    pieces = max(1, min(16, 16_000 // len(shards)))  # of thousands of shards fewer, to start in a second
    hashes = {shard["file"]: shard["sha256"] for shard in (read_manifest(data_root) or {"shards": []})["shards"]}
    return {s.path.name: [s.length, hashes.get(s.path.name), s.fingerprint(pieces)] for s in shards}
