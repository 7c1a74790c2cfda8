"""
The tokens of a split as one stream, checked as they are read.
"""

import contextlib
import os

import numpy as np

from lib.console import UserError
from lib.data.folder import ShardFolder
from lib.data.shards import open_file


class TokenStream:
    """The tokens of a split, shard after shard in name order. `data_root` is a path, or a ShardFolder."""

    def __init__(self, data_root, split, vocab_size=2**16):
        folder = data_root if isinstance(data_root, ShardFolder) else ShardFolder(data_root, [split])
        self.root = folder.root
        self.shards = folder.shards[split]
        self.vocab_size = vocab_size
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
