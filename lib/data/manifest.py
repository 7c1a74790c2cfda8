"""
The manifest of a folder of shards, and the folder while fineweb.py builds it.
"""

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from lib.console import UserError, say
from lib.data.shards import SHARD_NAME, open_shard, split_of
from lib.files import ROOT, atomic_write, hash_file, list_folder

DOWNLOADS = ".fineweb_download"  # in the folder of the shards; only for us, since all of it is deleted
# Tokens per byte of English, slightly overestimated (FineWeb-Edu: 0.35 as .parquet, 0.21 as .jsonl)
TOKENS_PER_BYTE = {".parquet": 0.375, ".jsonl": 0.25, ".json": 0.25, ".txt": 0.25, ".gz": 0.6, ".zst": 0.7, ".bin": 0.5}
# Required fields of a manifest, and of an unfinished one, which is resumed. fineweb.py writes others besides
MANIFEST = {"complete": bool, "shards": list}
UNFINISHED = {"tokens": int, "documents": int, "skipped_empty": int, "shard_size": int, "files": list, "progress": dict}
SHARD = {"file": str, "tokens": int, "sha256": str}
HUB_FILE = {"file": str, "size": int, "hash": str}  # a file still to be fetched
PROGRESS = {"file": int, "row": int, "skip": int}


def check_fields(record, fields):
    """Raise ValueError unless the record is a dict that holds these fields with values of these types."""
    for name, kind in fields.items():
        if not isinstance(record, dict) or type(record.get(name)) is not kind:
            raise ValueError(f'no "{name}" of type {kind.__name__} in {json.dumps(record)[:100]}')


def read_manifest(folder):
    """The manifest of a folder of shards, or None if it has none (shards made by other tools). Raises UserError
    for one that fineweb.py cannot have written."""
    path = Path(folder) / "manifest.json"
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # no permission, a name that is too long
        raise UserError(f"cannot read {path}: {error.strerror}. Fix that, or choose another folder") from None
    try:
        manifest = json.loads(content)
        check_fields(manifest, MANIFEST)
        for shard in manifest["shards"]:
            check_fields(shard, SHARD)
        if not manifest["complete"]:
            check_fields(manifest, UNFINISHED)
            check_fields(manifest["progress"], PROGRESS)
            for file in manifest["files"]:
                check_fields(file, HUB_FILE if "asked_revision" in manifest else {"file": str})
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is unfinished or damaged: {error}. If fineweb.py made the folder, delete it and build it again; "
            "if the file is another program's, choose another folder for the shards"
        ) from None
    return manifest


def find_manifest(out, wanted, verify=False):
    """The manifest of the shards in a folder, None if there are none. Raises UserError for shards of another source or
    other flags, and for shards that do not match the manifest."""
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
            "the same flags as before, choose another --out, or delete it"
        )
    for shard in manifest["shards"]:
        path = out / shard["file"]
        tokens = len(open_shard(path))
        if tokens != shard["tokens"] or (verify and hash_file(path) != shard["sha256"]):
            reason = "the sha256" if tokens == shard["tokens"] else f"the {shard['tokens']:,} tokens"
            raise UserError(f"{path} does not have {reason} of its manifest entry: delete {out} and build it again")
    if manifest["complete"]:
        tokens = sum(shard["tokens"] for shard in manifest["shards"])
        say(
            f"{out} is already complete: {tokens:,} tokens in {len(manifest['shards'])} shards, "
            + ("every sha256 is correct" if verify else "every size is correct (--verify checks every sha256)")
        )
    return manifest


def write_manifest(out, manifest, **progress):
    """Write the manifest, with the progress of an unfinished build; returns its size in bytes."""
    content = json.dumps({**manifest, **progress}, indent=1).encode() + b"\n"
    with atomic_write(out / "manifest.json") as file:
        file.write(content)
    return len(content)


def estimate_tokens(files):
    """Estimate the number of tokens of the files: for the size of a shard, the disk needed and the time left."""
    return int(sum(f.get("tokens") or f["size"] * TOKENS_PER_BYTE[Path(f["file"]).suffix.lower()] for f in files))


def check_disk(out, manifest, estimate, keep):
    """Raise UserError if the disk has no room for the estimated tokens and the files still to be fetched."""
    need = 2 * max(0, estimate - sum(shard["tokens"] for shard in manifest["shards"]))
    fetched = [f["size"] for f in manifest["files"] if "hash" in f and not (out / DOWNLOADS / f["file"]).exists()]
    need += sum(fetched if keep else sorted(fetched)[-2:])  # without `keep`, one or two at a time
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
    """Remove the folder again if an error occurs before anything of value is in it."""
    try:
        yield
    except UserError:
        if not (out / "manifest.json").exists():
            (out / "lock").unlink(missing_ok=True)
            for _ in range(20):  # the thread that fetches the next file may still write there
                shutil.rmtree(out / DOWNLOADS, ignore_errors=True)
                with contextlib.suppress(OSError):  # the user's own files
                    out.rmdir()
                time.sleep(0.1)
                if not (out / DOWNLOADS).exists():
                    break
        raise


def build_missing(source, data_dir):
    """Have fineweb.py build the shards of a folder that is missing or unfinished."""
    manifest = read_manifest(data_dir)
    # fineweb.py writes the manifest before the first shard: shards without one are another program's, and complete
    foreign = [] if manifest else [path.name for path in list_folder(data_dir)]
    if not any(map(split_of, foreign)) and not (manifest and manifest["complete"]):
        if any(name != "lock" and not name.startswith(".") and not name.endswith(".tmp") for name in foreign):
            raise UserError(f"{data_dir}/ holds other files and no shards: build them with python fineweb.py")
        command = ["fineweb.py", "--source", source, "--out", data_dir]
        say(f"{data_dir}/ is {'unfinished' if manifest else 'missing'}, building it: python {shlex.join(command)}")
        if subprocess.run([sys.executable, ROOT / command[0], *command[1:]]).returncode:
            raise UserError(f"building {data_dir} failed, see above")
