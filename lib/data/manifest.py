"""
The manifest of a folder of shards: what they were made of, their sizes and hashes, and how far a build has come.
"""

import json
from pathlib import Path

from lib.console import UserError, say
from lib.data.shards import SHARD_NAME, Shard
from lib.files import atomic_write, hash_file, list_folder

# Required fields of a manifest, and of an unfinished one, which is resumed (more fields may be present)
COMPLETE = {"complete": bool, "shards": [{"file": str, "tokens": int, "sha256": str}]}
UNFINISHED = {
    **{"tokens": int, "documents": int, "skipped_empty": int, "shard_size": int, "files": [{"file": str}]},
    **{"progress": {"file": int, "row": int, "skip": int}},
}


def has_form(value, form):
    """Whether a value has a form: a type, a list with an element's form, or a dict with some fields' forms."""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(has_form(value.get(name), kind) for name, kind in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and all(has_form(element, form[0]) for element in value)
    return type(value) is form


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
        fault = "" if has_form(manifest, COMPLETE) else "it lacks what fineweb.py writes"
        if not fault and not manifest["complete"] and not has_form(manifest, UNFINISHED):
            fault = "it lacks the progress that fineweb.py writes"
    except (ValueError, RecursionError) as error:
        fault = str(error)
    if fault:
        raise UserError(
            f"{path} is unfinished or damaged: {fault}. If fineweb.py made the folder, delete it and build it again; "
            "if the file is another program's, choose another folder for the shards"
        )
    return manifest


def find_manifest(out, wanted, files=None, verify=False):
    """The manifest of the shards in a folder, None if there are none. Raises UserError for shards of other flags or
    another source, of which `files` are the local ones, and for shards that do not match the manifest."""
    manifest = read_manifest(out)
    if not manifest:
        if any(SHARD_NAME.fullmatch(path.name) for path in list_folder(out)):
            raise UserError(f"{out} already holds shards of unknown origin: choose another --out or delete it")
        return None
    found = {key: manifest.get(key) for key in wanted if manifest.get(key) != wanted[key]}
    if list(found) == ["revision"]:
        raise UserError(f"{out} holds shards of {wanted['source']} as it was: {name_changes(manifest, wanted, files)}")
    if found:
        asked = {key: wanted[key] for key in found}
        raise UserError(
            f"{out} already holds shards of {manifest.get('source')} with {found}, not with {asked}: start again with "
            "the same flags as before, choose another --out, or delete it"
        )
    for shard in manifest["shards"]:
        path = out / shard["file"]
        tokens = Shard.open(path).length
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


def name_changes(manifest, wanted, files):
    """What has changed in a source since the shards were begun, and the remedy."""
    whole = "version" in manifest  # earlier builds recorded neither a file's folder nor a sample of its content
    old = {file["file"]: file for file in manifest.get("files", [])}
    new = {file["file"] if whole else Path(file["file"]).name: file for file in files}
    changes = [f"{name} is new" for name in new.keys() - old] + [f"{name} is gone" for name in old.keys() - new]
    for name in old.keys() & new:
        if any(old[name].get(field, new[name].get(field)) != new[name].get(field) for field in ("size", "sample")):
            changes.append(f"{name} has changed")
    if not changes:
        changes = [f"it was {manifest.get('revision')}, and is {wanted['revision']}"]
    more = f" and {len(changes) - 9} more" if len(changes) > 9 else ""
    return f"{', '.join(sorted(changes)[:9])}{more}. Restore it, or delete the shards or choose another --out"


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


def write_shard(path, fill):
    """Write a shard by fill(file); returns its entry in the manifest."""
    write(path, fill)
    return {"file": path.name, "tokens": Shard.open(path).length, "sha256": hash_file(path)}
