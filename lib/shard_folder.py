"""
The folder of shards while fineweb.py builds it: its manifest, its disk, and what is cleared away.
"""

import contextlib
import json
import shutil
import time
from pathlib import Path

from lib.common import UserError, atomic_write, say
from lib.shards import SHARD_NAME, hash_file, open_shard, read_manifest

DOWNLOADS = ".fineweb_download"  # in the folder of the shards; ours alone, since it is deleted whole
# Tokens per byte of a file of English, a little above the truth (FineWeb-Edu: 0.35 as .parquet, 0.21 as .jsonl)
TOKENS_PER_BYTE = {".parquet": 0.375, ".jsonl": 0.25, ".txt": 0.25, ".gz": 0.6, ".zst": 0.7, ".bin": 0.5}


def find_manifest(out, wanted, verify=False):
    """The manifest of the shards in a folder, None where there are none. Raises UserError for the shards of another
    source or other flags, and for shards that are not what the manifest says."""
    manifest = read_manifest(out)
    if not manifest:
        if out.is_dir() and any(SHARD_NAME.fullmatch(path.name) for path in out.iterdir()):
            raise UserError(f"{out} already holds shards of unknown origin: choose another --out or delete it")
        return None
    found = {key: manifest.get(key) for key in wanted if manifest.get(key) != wanted[key]}
    if found:
        asked = {key: wanted[key] for key in found}
        raise UserError(
            f"{out} already holds shards of {manifest.get('source')} with {found}, not with {asked}: start again with "
            "the flags of before, choose another --out, or delete it"
        )
    for shard in manifest["shards"]:
        path = out / shard["file"]
        tokens = len(open_shard(path))
        if tokens != shard["tokens"] or (verify and hash_file(path) != shard["sha256"]):
            reason = "the sha256" if tokens == shard["tokens"] else f"the {shard['tokens']:,} tokens"
            raise UserError(f"{path} does not have {reason} that the manifest says: delete {out} and build it again")
    if manifest["complete"]:
        tokens = sum(shard["tokens"] for shard in manifest["shards"])
        say(
            f"{out} is already complete: {tokens:,} tokens in {len(manifest['shards'])} shards, "
            + ("every sha256 is right" if verify else "every size is right (--verify computes every sha256)")
        )
    return manifest


def write_manifest(out, manifest, **progress):
    with atomic_write(out / "manifest.json") as file:
        file.write(json.dumps({**manifest, **progress}, indent=1).encode() + b"\n")


def estimate_tokens(files):
    """About how many tokens the files will give: for the size of a shard, the disk needed and the time left."""
    return int(sum(f.get("tokens") or f["size"] * TOKENS_PER_BYTE[Path(f["file"]).suffix] for f in files))


def check_disk(out, manifest, estimate, keep):
    """Raise UserError where the disk has no room for the estimated tokens and for what is still to be fetched."""
    need = 2 * max(0, estimate - sum(shard["tokens"] for shard in manifest["shards"]))
    fetched = [f["size"] for f in manifest["files"] if "hash" in f and not (out / DOWNLOADS / f["file"]).exists()]
    need += sum(fetched if keep else sorted(fetched)[-2:])  # without `keep` they lie there one or two at a time
    free = shutil.disk_usage(out).free
    if need > free:
        raise UserError(
            f"{out} needs {need / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free: make room, or choose another "
            "--out"
        )
    if need > 1e8:
        say(f"{out} needs about {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")


@contextlib.contextmanager
def removed_if_empty(out):
    """Leave no folder behind where an error comes before anything of worth is in it."""
    try:
        yield
    except UserError:
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
