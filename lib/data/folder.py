"""
A folder of token shards: which there are, whether they are complete, and what identifies them.
"""

from lib.console import UserError, print0
from lib.data.manifest import read_manifest
from lib.data.shards import SPLITS, Shard, open_file, split_of
from lib.files import expand, list_folder


def find_shards(data_root, splits=SPLITS, optional=()):
    """The names of the shards of each split in name order, and the sha256 of those in a manifest, by name. Raises
    UserError if a split that is not optional has none."""
    paths = sorted(path.name for path in list_folder(data_root))
    names = {split: [name for name in paths if split_of(name) == split] for split in splits}
    for split in splits:
        if not names[split] and split not in optional:
            raise UserError(
                f"no *_{split}_*.npy shards in {data_root}/, nor .bin: run python fineweb.py --out {data_root} (28 GB "
                "of FineWeb-Edu, or your own text with --source), or try python train_gpt2.py --preset demo"
            )
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
    """A folder of token shards, each opened once. Raises UserError if shards are damaged or missing.

    shards: the Shards of each split in name order; facts: what identifies them, by name, as plain data: the token
    count, the sha256 from a manifest or None, the fingerprint.
    """

    def __init__(self, root, splits=SPLITS, optional=()):
        self.root = expand(root)
        open_file.cache_clear()  # an earlier run of this process may have opened shards that were replaced since
        names, hashes = find_shards(self.root, splits, optional)
        self.shards = {split: [Shard.open(f"{self.root}/{name}") for name in names[split]] for split in splits}
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
        while length >= (min(train, val) if validate else train):  # a sequence needs one token more, its last target
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


def open_shards(data_dir, T, sequences, validate):
    """The ShardFolder of a run, checked for steps of this many sequences of T tokens."""
    folder = ShardFolder(data_dir, optional=() if validate else ("val",))
    folder.check(T, sequences, validate)
    return folder


def count_tokens(data_dir):
    """The number of training tokens in a folder of shards, None if there are none."""
    try:
        return sum(shard.length for shard in ShardFolder(data_dir, ["train"]).shards["train"])
    except UserError:
        return None


def is_built(data_dir):
    """Whether a folder has a complete set of shards; if not, fineweb.py may build them there. Raises UserError for a
    folder of other files."""
    manifest = read_manifest(data_dir)
    if manifest:
        return manifest["complete"]
    # fineweb.py writes the manifest before the first shard: shards without one are another program's, and complete
    names = [path.name for path in list_folder(data_dir)]
    if any(map(split_of, names)):
        return True
    if any(name != "lock" and not name.startswith(".") and not name.endswith(".tmp") for name in names):
        raise UserError(f"{data_dir}/ holds other files and no shards: build them with python fineweb.py")
    return False
