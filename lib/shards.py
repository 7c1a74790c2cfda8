"""
Token shards: their format, their manifest, and their folder while fineweb.py builds it.
"""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from lib.common import InputError, atomic_write, hash_file

SHARD_NAME = re.compile(r"(?P<name>.+)_(?P<split>train|val)_(?P<index>\d{6})\.(npy|bin)")
# Tokens per byte of a file, a little above the truth (FineWeb-Edu: 0.35): for the time left and the disk needed
TOKENS_PER_BYTE = {".parquet": 0.375, ".jsonl": 0.25, ".txt": 0.25, ".bin": 0.5}
DOWNLOADS = ".download"  # in the folder of the shards


def read_manifest(folder):
    """The manifest of a folder of shards, or None where it has none (shards made by other tools)."""
    path = Path(folder) / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else None


def find_shards(data_root, split):
    """The paths of a split's shards in name order. Raises InputError where there are none."""
    root = Path(data_root)
    paths = sorted(root.iterdir()) if root.is_dir() else []
    paths = [path for path in paths if (m := SHARD_NAME.fullmatch(path.name)) and m["split"] == split]
    if not paths:
        raise InputError(
            f"no *_{split}_*.npy shards in {data_root}/: run python fineweb.py --out {data_root} (28 GB download), "
            "or try python train_gpt2.py --preset demo"
        )
    manifest = read_manifest(root)
    if manifest and not manifest["complete"]:
        raise InputError(f"{data_root}/ is unfinished: start fineweb.py again with the flags that it was started with")
    if manifest:
        listed = {s["file"] for s in manifest["shards"] if SHARD_NAME.fullmatch(s["file"])["split"] == split}
        for name in sorted(listed ^ {path.name for path in paths}):
            raise InputError(f"{root}/{name} is in the folder or in its manifest.json, not in both: build it again")
    return paths


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
        raise InputError(f"{path} is not a whole token shard: {error}. Fetch it again or build it again") from None
    return tokens


def build_missing(source, data_dir):
    """Have fineweb.py make the shards of a folder that is missing or unfinished."""
    manifest = read_manifest(data_dir)
    if not (manifest and manifest["complete"]):
        command = ["fineweb.py", "--source", source, "--out", data_dir]
        print(f"{data_dir}/ is missing, building it: python {' '.join(command)}", flush=True)
        if subprocess.run([sys.executable, Path(__file__).parent.parent / command[0], *command[1:]]).returncode:
            raise InputError(f"building {data_dir} failed, see above")


def find_manifest(out, wanted, verify=False):
    """The manifest of the shards in a folder, None where there are none. Raises InputError for the shards of another
    source or other flags, and for shards that are not what the manifest says."""
    manifest = read_manifest(out)
    if not manifest:
        if out.is_dir() and any(SHARD_NAME.fullmatch(path.name) for path in out.iterdir()):
            raise InputError(f"{out} already holds shards of unknown origin: choose another --out or delete it")
        return None
    found = {key: manifest.get(key) for key in wanted if manifest.get(key) != wanted[key]}
    if manifest.get("ready_made"):  # those shards have the size that they have
        found.pop("shard_size", None)
    if found:
        asked = {key: wanted[key] for key in found}
        raise InputError(
            f"{out} already holds shards of {manifest.get('source')} with {found}, not with {asked}: start again with "
            "the flags of before, choose another --out, or delete it"
        )
    for shard in manifest["shards"]:
        path = out / shard["file"]
        tokens = len(open_shard(path))
        if tokens != shard["tokens"] or (verify and hash_file(path) != shard["sha256"]):
            reason = "the sha256" if tokens == shard["tokens"] else f"the {shard['tokens']:,} tokens"
            raise InputError(f"{path} does not have {reason} that the manifest says: delete {out} and build it again")
    if manifest["complete"]:
        print(
            f"{out} is already complete: {manifest['tokens']:,} tokens in {len(manifest['shards'])} shards, "
            + ("every sha256 is right" if verify else "every size is right (--verify computes every sha256)")
        )
    return manifest


def write_manifest(out, manifest, **progress):
    with atomic_write(out / "manifest.json") as file:
        file.write(json.dumps({**manifest, **progress}, indent=1).encode() + b"\n")


def check_disk(out, manifest, keep):
    """Return the tokens to expect. Raises InputError where the disk has no room for the shards and the downloads."""
    files = [file for file in manifest["files"] if "size" in file]  # all but the demo
    tokens = int(sum(file["size"] * TOKENS_PER_BYTE[Path(file["file"]).suffix] for file in files))
    need = 2 * max(0, tokens - sum(shard["tokens"] for shard in manifest["shards"]))
    downloads = [f["size"] for f in files if "hash" in f and not (out / DOWNLOADS / f["file"]).exists()]
    if not manifest["ready_made"]:  # those become the shards; others lie there one or two at a time
        need += sum(downloads if keep else sorted(downloads)[-2:])
    free = shutil.disk_usage(out).free
    if need > free:
        raise InputError(
            f"{out} needs {need / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free: make room, or choose another "
            "--out"
        )
    if need > 1e8:
        print(f"{out} needs about {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free", flush=True)
    return tokens


@contextlib.contextmanager
def removed_if_empty(out):
    """Leave no folder behind where an error comes before anything of worth is in it."""
    try:
        yield
    except InputError:
        if not (out / "manifest.json").exists():
            (out / "lock").unlink(missing_ok=True)
            for _ in range(20):  # the thread that fetches the next file may be at work there
                shutil.rmtree(out / DOWNLOADS, ignore_errors=True)
                with contextlib.suppress(OSError):  # the user's own files
                    out.rmdir()
                    break
                if not (out / DOWNLOADS).exists():
                    break
                time.sleep(0.1)
        raise
