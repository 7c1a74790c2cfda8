"""
The order of the training data: a shuffle by a formula, which takes no memory and no time at the start, and is the same
on every machine.
"""

import numpy as np

ROUNDS = 8


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
    """The place of position `index` of an epoch: a permutation of range(n) for each (seed, epoch). All three are int64
    arrays of one shape. Results outside of range(n) are permuted again until they are inside, which keeps it a
    bijection (cycle walking)."""
    half = (max(n - 1, 1).bit_length() + 1) // 2
    key = mix(mix(np.uint64(seed) + np.zeros(len(index), np.uint64)) + epoch.astype(np.uint64))
    x = feistel(index.astype(np.uint64), key, half)
    while (outside := x >= n).any():
        x[outside] = feistel(x[outside], key[outside], half)
    return x.astype(np.int64)
