"""A folder of token shards: whether it is complete, what identifies it, and each split as one stream of tokens."""

import numpy as np

from lib.console import UserError, print0
from lib.data.manifest import read_manifest
from lib.data.shards import SPLITS, OpenFile, Shard, split_of
from lib.files import expand, list_folder
from lib.foreign import recognize


def find_shards(data_root, splits=SPLITS, optional=()):
    """The names of the shards of each split in name order, and the sha256 of those in a manifest, by name. Raises
    UserError if a split that is not optional has none."""
    paths = sorted(path.name for path in list_folder(data_root))
    names = {split: [name for name in paths if split_of(name) == split] for split in splits}
    for split in splits:
        if not names[split] and split not in optional:
            build = f"python fineweb.py --out {data_root} (28 GB, or own text with --source)"
            remedy = recognize(data_root) or f": run {build}, or try python train_gpt2.py --preset demo"
            raise UserError(f"no *_{split}_*.npy shards in {data_root}/, nor .bin{remedy}")
    if hidden := sum(name.startswith(".") and split_of(name.lstrip("._")) is not None for name in paths):
        print0(f"{data_root}/: {hidden:,} hidden files skipped, though named like shards")
    manifest = read_manifest(data_root)
    if not manifest:
        return names, {}
    if not manifest["complete"]:
        raise UserError(f"{data_root}/ is unfinished: start fineweb.py again with the same flags as before")
    listed = {shard["file"]: shard["sha256"] for shard in manifest["shards"] if split_of(shard["file"]) in splits}
    for name in sorted(listed.keys() ^ set().union(*names.values())):
        raise UserError(f"{data_root}/{name} is missing from the folder or from manifest.json: build it again")
    return names, listed


class ShardFolder:
    """A folder of token shards, each opened once. Raises UserError if shards are damaged or missing. shards: those of
    each split in name order; facts: by name, the token count, the sha256 from a manifest or None, the fingerprint."""

    def __init__(self, root, splits=SPLITS, optional=()):
        self.root = expand(root)
        OpenFile.cache_clear()  # an earlier run of this process may have opened shards that were replaced since
        names, hashes = find_shards(self.root, splits, optional)
        shards = {name: Shard.open(f"{self.root}/{name}") for split in splits for name in names[split]}
        self.shards = {split: [shards[name] for name in names[split]] for split in splits}
        self.facts = {name: (shard.length, hashes.get(name), shard.fingerprint) for name, shard in shards.items()}


def open_shards(data_dir, T, sequences, validate):
    """The ShardFolder of a run. Raises UserError if it holds less than the `sequences` of T tokens of a step, or, to
    validate, less than one sequence."""
    folder = ShardFolder(data_dir, optional=() if validate else ("val",))
    for split, need in {"train": sequences * T + 1, "val": T + 1 if validate else 0}.items():  # + 1: the last target
        found = sum(shard.length for shard in folder.shards[split])
        if found < need:
            step = f"one step of {sequences} sequences of {T} tokens, which needs {need:,}"
            remedy = "build more, or lower --total_batch_size or --sequence_length"
            raise UserError(f"{folder.root}/ has {found:,} {split} tokens, too few for {step}: {remedy}")
    return folder


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

    def read(self, start, end):
        """The tokens from start to end as uint16. Raises UserError for an id that is not below vocab_size: on CUDA it
        would crash the process without a message."""
        pieces = []  # several if the span crosses from shard to shard
        while start < end:
            i = int(np.searchsorted(self.ends, start, side="right"))
            shard = self.shards[i]
            begin = start - int(self.ends[i]) + shard.length
            tokens = shard.read(begin, begin + end - start)
            if tokens.max() >= self.vocab_size:
                found = f"token id {tokens.max()} at offset {begin + tokens.argmax()}"
                remedy = "give a larger --vocab_size, or build it again"
                raise UserError(f"{shard.path} has {found}, not below vocab_size {self.vocab_size}: {remedy}")
            pieces.append(tokens)
            start += len(tokens)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
