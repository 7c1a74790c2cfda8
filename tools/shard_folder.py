"""
The folder of shards while fineweb.py builds it: its manifest, the disk below it, and what a failure leaves.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tools.common import SHARD_NAME, InputError, atomic_write, hash_file, open_shard, read_manifest
from tools.sources import TOKENS_PER_BYTE

DOWNLOADS = ".download"  # in the folder of the shards


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
