"""
The shards of a run before it begins: that they can be read, and what tells them from others.
"""

import hashlib

import numpy as np

from lib.common import InputError
from lib.shards import find_shards, open_shard, read_manifest


def fingerprint(shard):
    """A hash of 16 runs of 256 tokens, evenly spread: other content of the same length is noticed at no cost."""
    starts = np.linspace(0, max(0, len(shard) - 256), 16).astype(np.int64)
    return hashlib.sha256(b"".join(shard[start : start + 256].tobytes() for start in starts)).hexdigest()[:16]


def check(data_root, T, sequences):
    """Raise InputError where the shards are not whole, or hold less than the `sequences` of T tokens of a step.
    Returns what tells them from others: by name, the token count, the sha256 that a manifest has, a fingerprint."""
    train, val = ({path: open_shard(path) for path in find_shards(data_root, split)} for split in ("train", "val"))
    found = (sum(map(len, train.values())) - 1) // T
    if found < sequences:
        raise InputError(
            f"{data_root}/ has {found} training sequences of {T} tokens, too few for one step of {sequences}: build "
            "more, or lower total_batch_size"
        )
    shards = {**train, **val}
    hashes = {shard["file"]: shard["sha256"] for shard in (read_manifest(data_root) or {"shards": []})["shards"]}
    return {path.name: [len(tokens), hashes.get(path.name), fingerprint(tokens)] for path, tokens in shards.items()}
