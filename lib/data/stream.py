"""
The shards as a run reads them: one stream of tokens, quick to open and checked as it is read; and its shuffle, a
formula that takes no memory and no time at the start, and is the same on every machine.
"""

import contextlib
import functools
import hashlib
import os
import resource
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.console import UserError, print0
from lib.data.manifest import build_missing, read_manifest
from lib.data.shards import SPLITS, hidden_shards, open_shard, split_of
from lib.distributed import wait_for_all
from lib.files import expand, list_folder

NPY_HEADER = 128  # bytes, as fineweb.py and numpy write it
ROUNDS = 8  # of the shuffle
# A process may usually have 1,024 files open on Linux and 256 on macOS: a quarter is for shards
OPEN_FILES = max(8, min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))


@functools.lru_cache(maxsize=OPEN_FILES)
def open_file(path):
    return open(path, "rb", buffering=0)


class TokenFile(NamedTuple):
    """The tokens of a shard, read when they are needed. With a memory map, a file that is truncated during the run
    would end the process with SIGBUS; here it is an error that names the file."""

    path: str
    offset: int  # bytes before the first token
    length: int  # tokens
    fingerprint: str  # hash of evenly spread pieces of 256 tokens: detects other content of the same length

    @classmethod
    def open(cls, path, pieces):
        """Open a shard. Raises UserError if it is not a complete one."""
        try:
            file = os.open(path, os.O_RDONLY)  # twice as fast as open(), for 100,000 shards
            try:
                offset, length = NPY_HEADER, (os.fstat(file).st_size - NPY_HEADER) // 2
                if length <= 0 or os.pread(file, NPY_HEADER, 0) != npy_header(length):  # .bin, other tools, or damage
                    tokens = open_shard(Path(path))
                    offset, length = tokens.offset, len(tokens)
                starts = [max(0, length - 256) * i // max(1, pieces - 1) for i in range(pieces)]
                sample = b"".join([os.pread(file, 512, offset + 2 * start) for start in starts])
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}. Restore it, or build it again") from None
        return cls(path, offset, length, hashlib.sha256(sample).hexdigest()[:16])

    def read(self, start, end):
        """The tokens from start to end, or to the shard's end if that comes first, as uint16."""
        end = min(end, self.length)
        try:
            file = open_file(self.path)
            tokens = np.frombuffer(os.pread(file.fileno(), 2 * (end - start), self.offset + 2 * start), "<u2")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.path}: {error}. Restore it, and resume") from None
        if len(tokens) < end - start:
            raise UserError(f"{self.path} has become shorter than {end} tokens: restore it, and resume")
        return tokens


@functools.lru_cache(maxsize=4)  # all shards but the last have the same length
def npy_header(length):
    shape = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({length},), }}"
    return b"\x93NUMPY\x01\x00v\x00" + shape.encode().ljust(NPY_HEADER - 11) + b"\n"


def find_shards(data_root, splits=SPLITS, optional=()):
    """The names of the shards of each split in name order, and the sha256 of those in a manifest, by name. Raises
    UserError if a split that is not optional has none."""
    names = {split: [] for split in splits}
    for name in sorted(path.name for path in list_folder(data_root)):
        if (split := split_of(name)) in names:
            names[split].append(name)
    for split in splits:
        if not names[split] and split not in optional:
            raise UserError(
                f"no *_{split}_*.npy shards in {data_root}/, nor .bin: run python fineweb.py --out {data_root} (28 GB "
                "of FineWeb-Edu, or your own text with --source), or try python train_gpt2.py --preset demo"
            )
    manifest = read_manifest(data_root)
    if manifest and not manifest["complete"]:
        raise UserError(f"{data_root}/ is unfinished: start fineweb.py again with the same flags as before")
    listed = {shard["file"]: shard["sha256"] for shard in manifest["shards"]} if manifest else {}
    of_splits = {name for name in listed if split_of(name) in splits}
    for name in sorted(of_splits ^ set().union(*names.values())) if manifest else ():
        raise UserError(f"{data_root}/{name} is in the folder or in its manifest.json, not in both: build it again")
    return names, listed


class ShardFolder:
    """A folder of token shards, each opened once. Raises UserError if shards are damaged or missing.

    shards: the TokenFiles of each split in name order; facts: what identifies them, by name, as plain data: the token
    count, the sha256 from a manifest or None, the fingerprint.
    """

    def __init__(self, root, splits=SPLITS, optional=()):
        root = expand(root)
        open_file.cache_clear()  # an earlier run of this process may have opened shards that were replaced since
        self.root, (names, hashes) = root, find_shards(root, splits, optional)
        if hidden := hidden_shards(os.listdir(root)):
            print0(f"{root}/: {hidden:,} hidden files skipped, though named like shards")
        pieces = max(1, min(16, 16_000 // sum(map(len, names.values()))))  # fewer for thousands, to start in a second
        self.shards = {split: [TokenFile.open(f"{root}/{name}", pieces) for name in names[split]] for split in splits}
        self.facts = {
            name: (shard.length, hashes.get(name), shard.fingerprint)
            for split in splits
            for name, shard in zip(names[split], self.shards[split], strict=True)
        }

    def check(self, T, sequences, validate=True):
        """Raise UserError if the shards hold less than the `sequences` of T tokens of a step, or, to validate, less
        than one sequence. The message has flags with which they suffice."""
        train, val = (sum(shard.length for shard in self.shards[split]) for split in SPLITS)
        length, fewer = T, sequences
        while length >= (min(train, val) if validate else train):  # a sequence takes one token more, its last target
            length //= 2
        while length and fewer > (train - 1) // length:
            fewer //= 2
        if (length, fewer) != (T, sequences):
            flags = f"--sequence_length {length} --total_batch_size {fewer * length} and fewer --max_steps"
            raise UserError(
                f"{self.root}/ has {train:,} training tokens and {val:,} for validation, too few for one step of "
                f"{sequences} sequences of {T} tokens{' and a sequence of validation' if validate else ''}: build more"
                + (f", or give {flags}" if length else "")
            )


def open_shards(data_dir, source, T, sequences, validate, local_rank):
    """The ShardFolder of a run, checked for steps of this many sequences of T tokens. If the folder is missing or
    unfinished and there is a `source`, fineweb.py builds it, once per machine, while the other ranks wait."""
    if local_rank == 0 and source:
        build_missing(source, data_dir)
    wait_for_all()
    folder = ShardFolder(data_dir, optional=() if validate else ("val",))
    folder.check(T, sequences, validate)
    return folder


def count_tokens(data_dir):
    """The number of training tokens in a folder of shards, None if there are none."""
    try:
        return sum(shard.length for shard in ShardFolder(data_dir, ["train"]).shards["train"])
    except UserError:
        return None


class TokenStream:
    """The tokens of a split, shard after shard in name order. `data_root` is a path, or a ShardFolder."""

    def __init__(self, data_root, split, vocab_size=2**16):
        folder = data_root if isinstance(data_root, ShardFolder) else ShardFolder(data_root, [split])
        self.root, self.shards, self.vocab_size = folder.root, folder.shards[split], vocab_size
        self.ends = np.cumsum([shard.length for shard in self.shards])  # where each one ends in the stream

    def __len__(self):
        return int(self.ends[-1])

    def locate(self, position):
        """The shard that holds a token of the stream, and its position there."""
        i = int(np.searchsorted(self.ends, position, side="right"))
        return self.shards[i], position - int(self.ends[i]) + self.shards[i].length

    def will_need(self, spans):
        """Have the system read these (start, end) spans into its cache in the background, in parallel."""
        for start, end in spans if hasattr(os, "posix_fadvise") else ():
            shard, begin = self.locate(start)
            with contextlib.suppress(OSError):  # read() reports a missing shard
                where = open_file(shard.path).fileno(), shard.offset + 2 * begin, 2 * (end - start)
                os.posix_fadvise(*where, os.POSIX_FADV_WILLNEED)

    def read(self, start, end):
        """The tokens from start to end as uint16. Raises UserError for an id that is not below vocab_size: on CUDA it
        would crash the process without a message."""
        pieces = []  # several if the span crosses from shard to shard
        while start < end:
            shard, begin = self.locate(start)
            tokens = shard.read(begin, begin + end - start)
            if tokens.max() >= self.vocab_size:
                raise UserError(
                    f"{shard.path} has token id {tokens.max()} at offset {begin + tokens.argmax()}, not below "
                    f"vocab_size {self.vocab_size}: it is damaged or from another tokenizer, build it again"
                )
            pieces.append(tokens)
            start += len(tokens)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def mix(x):
    """uint64 to uint64, every bit depending on every bit: the finalizer of SplitMix64 (Steele et al., 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


def feistel(x, key, half):
    """A bijection of the numbers below 4^half: a Feistel network, whose rounds are invertible whatever `mix` does."""
    left, right = x >> half, x & ((1 << half) - 1)
    for number in range(ROUNDS):
        left, right = right, left ^ (mix(key + number + (right << 8)) & ((1 << half) - 1))
    return left << half | right


def shuffle(index, n, seed, epoch):
    """The place of position `index` of an epoch: a permutation of range(n) for each (seed, epoch).

    index and epoch are int64 arrays of one shape, and so is the result. Results outside of range(n) are permuted
    again until they are inside, which keeps it a bijection (cycle walking).
    """
    half = (max(n - 1, 1).bit_length() + 1) // 2
    key = mix(mix(np.uint64(seed) + np.zeros(len(index), np.uint64)) + epoch.astype(np.uint64))
    x = feistel(index.astype(np.uint64), key, half)
    while (outside := x >= n).any():
        x[outside] = feistel(x[outside], key[outside], half)
    return x.astype(np.int64)
