"""
Token shards: the names of the files and their formats.
"""

import re
from pathlib import Path

import numpy as np

from lib.console import UserError

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


def hidden_shards(names):
    """How many of the names are those of shards, but for leading dots."""
    return sum(name.startswith(".") and split_of(name.lstrip("._")) is not None for name in names)


def check_shard_set(paths):
    """Raise UserError unless these token shards (.bin) fit into one folder and have both splits."""
    for split in SPLITS:
        if not any(split_of(Path(path).name) == split for path in paths):
            raise UserError(f"no *_{split}_*.bin among {', '.join(paths[:5])}: choose a data set that has both splits")
    of_name = {}
    for path in paths:
        if (other := of_name.setdefault(Path(path).name, path)) != path:
            raise UserError(f"{other} and {path} have the same name: choose the folder of one of them with --name")


def open_shard(path):
    """Memory-map a shard: a .npy of one-dimensional uint16, or llm.c's .bin (a header of 256 int32, then uint16)."""
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            header = np.fromfile(path, "<i4", 256)
            tokens = np.memmap(path, "<u2", mode="r", offset=1024)
            if len(header) < 3 or tuple(header[:3]) != (20240520, 1, len(tokens)):
                raise ValueError(f"its header {header[:3]} should be 20240520, 1 and its {len(tokens)} tokens")
        if tokens.dtype != np.uint16 or tokens.ndim != 1 or len(tokens) == 0:
            raise ValueError(f"it has dtype {tokens.dtype} and shape {tokens.shape}, not uint16 in one dimension")
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a complete token shard: {error}. Fetch or build it again") from None
    return tokens
