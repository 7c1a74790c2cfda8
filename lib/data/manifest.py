"""The manifest of a folder of shards: what they were made of, their sizes and hashes, and how far a build has come."""

import json
from pathlib import Path

import numpy as np

from lib.console import UserError, say
from lib.data.shards import Shard, split_of
from lib.files import atomic_write, hash_file, list_folder


def read_manifest(folder):
    """The manifest of a folder of shards, None if there is none. Raises UserError for one that is not fineweb.py's."""
    path = Path(folder) / "manifest.json"
    if path not in list_folder(folder):
        return None
    try:
        manifest = json.loads(path.read_bytes())
        if not isinstance(manifest, dict) or not {"complete", "shards"} <= manifest.keys():
            raise ValueError("it lacks what fineweb.py writes")
    except (OSError, ValueError, RecursionError) as error:
        remedy = f"delete {folder} and build it again, or, if another program made it, choose another folder"
        raise UserError(f"{path} is damaged or cannot be read: {error}; {remedy}") from None
    return manifest


def find_manifest(out, wanted, files=None, verify=False):
    """The manifest of the shards in a folder, None if there are none. Raises UserError for shards of other flags or
    another source, of which `files` are the local ones, and for shards that do not match the manifest."""
    manifest = read_manifest(out)
    if not manifest:
        if any(split_of(path.name) for path in list_folder(out)):
            raise UserError(f"{out} already holds shards of unknown origin: choose another --out or delete it")
        return None
    found = {key: manifest.get(key) for key in wanted if manifest.get(key) != wanted[key]}
    if "revision" in found and "source" not in found and files and files != manifest["files"]:
        old, new = ({tuple(file.items()) for file in of} for of in (manifest["files"], files))
        names = sorted({dict(file)["file"] for file in old ^ new})
        changed = f"changed, new or gone since then: {', '.join(names[:9] + ['...'] * (len(names) > 9))}"
        remedy = f"Restore them, choose another --out, or delete {out}"
        raise UserError(f"{out} holds shards of {wanted['source']} as it was; {changed}. {remedy}")
    if found:
        asked = {key: wanted[key] for key in found}
        remedy = "give the same flags as before, choose another --out, or delete it"
        raise UserError(f"{out} already holds shards of {manifest.get('source')} with {found}, not {asked}: {remedy}")
    for shard in manifest["shards"]:
        path = out / shard["file"]
        if Shard.open(path).length != shard["tokens"] or (verify and hash_file(path) != shard["sha256"]):
            raise UserError(f"{path} is not the shard that its manifest lists: delete {out} and build it again")
    if manifest["complete"]:
        checked = "sha256" if verify else "size"
        say(f"{out} is already complete: {manifest['tokens']:,} tokens, every {checked} correct")
    return manifest


def write(path, fill):
    """Write a file of the folder by fill(file). Raises UserError if the file system refuses."""
    try:
        with atomic_write(path) as file:
            fill(file)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; start again to resume after the last finished shard") from error


def write_manifest(out, manifest, **progress):
    """Write the manifest, with the progress of an unfinished build."""
    content = json.dumps({**manifest, **progress}, indent=1).encode() + b"\n"
    write(out / "manifest.json", lambda file: file.write(content))


def write_shard(path, tokens):
    """Write a shard; returns its entry in the manifest."""
    write(path, lambda file: np.save(file, tokens))
    return {"file": path.name, "tokens": len(tokens), "sha256": hash_file(path)}
