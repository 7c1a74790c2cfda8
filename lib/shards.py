"""
Token shards as they are read: their names, their format, and the manifest beside them.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from lib.common import UserError, say

SPLITS = ("train", "val")
SHARD_NAME = re.compile(r"(?P<name>.+)_(?P<split>train|val)_(?P<index>\d{6})\.(npy|bin)")
# What a manifest holds; an unfinished one also says how to go on. fineweb.py writes more, which nobody relies on
MANIFEST = {"complete": bool, "shards": list}
UNFINISHED = {"tokens": int, "documents": int, "skipped_empty": int, "shard_size": int, "files": list, "progress": dict}
SHARD = {"file": str, "tokens": int, "sha256": str}
PROGRESS = {"file": int, "row": int, "skip": int}


def check_fields(record, fields):
    """Raise ValueError unless the record is a dict that holds these fields with values of these types."""
    for name, kind in fields.items():
        if not isinstance(record, dict) or type(record.get(name)) is not kind:
            raise ValueError(f'no "{name}" of type {kind.__name__} in {json.dumps(record)[:100]}')


def read_manifest(folder):
    """The manifest of a folder of shards, or None where it has none (shards made by other tools). Raises UserError
    for one that is not as fineweb.py writes it."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_bytes())
        check_fields(manifest, MANIFEST)
        for shard in manifest["shards"]:
            check_fields(shard, SHARD)
        if not manifest["complete"]:
            check_fields(manifest, UNFINISHED)
            check_fields(manifest["progress"], PROGRESS)
            for file in manifest["files"]:
                check_fields(file, {"file": str})
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is unfinished or damaged: {error}. If fineweb.py made the folder, delete it and build it again; "
            "if the file is another program's, choose another folder for the shards"
        ) from None
    return manifest


def split_of(name):
    """ "train" or "val" for the name of a shard, None for any other name."""
    match = SHARD_NAME.fullmatch(name)
    return match and match["split"]


def find_shards(data_root, splits=SPLITS):
    """The names of the shards of each split in name order, and the sha256 of those that a manifest knows, by name.
    Raises UserError where a split has none."""
    names = {split: [] for split in splits}
    for name in sorted(os.listdir(data_root)) if os.path.isdir(data_root) else ():
        if (split := split_of(name)) in names:
            names[split].append(name)
    for split in splits:
        if not names[split]:
            raise UserError(
                f"no *_{split}_*.npy shards in {data_root}/: run python fineweb.py --out {data_root} (FineWeb-Edu, 28 "
                "GB to fetch, or your own text with --source), or try python train_gpt2.py --preset demo"
            )
    manifest = read_manifest(data_root)
    if manifest and not manifest["complete"]:
        raise UserError(f"{data_root}/ is unfinished: start fineweb.py again with the flags that it was started with")
    listed = {shard["file"]: shard["sha256"] for shard in manifest["shards"]} if manifest else {}
    of_splits = {name for name in listed if split_of(name) in splits}
    for name in sorted(of_splits ^ set().union(*names.values())) if manifest else ():
        raise UserError(f"{data_root}/{name} is in the folder or in its manifest.json, not in both: build it again")
    return names, listed


def check_shard_set(paths):
    """Raise UserError unless these token shards can lie in one folder and have both splits."""
    for split in SPLITS:
        if not any(split_of(Path(path).name) == split for path in paths):
            raise UserError(f"no *_{split}_*.bin among {', '.join(paths[:5])}: choose a data set that has both splits")
    of_name = {}
    for path in paths:
        if (other := of_name.setdefault(Path(path).name, path)) != path:
            raise UserError(f"{other} and {path} have one name: choose the folder of one of them with --name")


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
        raise UserError(f"{path} is not a whole token shard: {error}. Fetch it again or build it again") from None
    return tokens


def hash_file(path, digest=None):
    """The hash of a file in hexadecimal, sha256 unless told, read in pieces: shards and downloads are large."""
    digest = digest or hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sample_hash(path):
    """The hash of a file's size and of four pieces of 16 kB, evenly spread: another content is noticed at no cost."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            for i in range(4):
                file.seek(max(0, size - (16 << 10)) * i // 3)
                digest.update(file.read(16 << 10))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. Mend it, or delete it") from None
    return digest.hexdigest()


def build_missing(source, data_dir):
    """Have fineweb.py make the shards of a folder that is missing or unfinished."""
    manifest = read_manifest(data_dir)
    # fineweb.py writes the manifest before the first shard: shards without one are another program's, and whole
    foreign = os.listdir(data_dir) if not manifest and os.path.isdir(data_dir) else []
    if not any(map(split_of, foreign)) and not (manifest and manifest["complete"]):
        if any(name != "lock" and not name.startswith(".") and not name.endswith(".tmp") for name in foreign):
            raise UserError(f"{data_dir}/ holds other files and no shards: make those with python fineweb.py")
        command = ["fineweb.py", "--source", source, "--out", data_dir]
        say(f"{data_dir}/ is {'unfinished' if manifest else 'missing'}, building it: python {' '.join(command)}")
        if subprocess.run([sys.executable, Path(__file__).parent.parent / command[0], *command[1:]]).returncode:
            raise UserError(f"building {data_dir} failed, see above")
