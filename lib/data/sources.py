"""
What fineweb.py reads: the demo corpus, local files of text, and data sets of the Hugging Face hub.

A source is a list of files in a fixed order.
"""

import re
import shutil
import sys
from pathlib import Path

import numpy as np

from lib.console import UserError, say
from lib.data import hub
from lib.data.local import local_source
from lib.data.readers import format_of
from lib.data.shards import FINEWEB_EDU
from lib.files import expand, why_missing

FINEWEB_EDU_REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"  # pinned, since data sets on the hub change
DOWNLOADS = ".fineweb_download"  # in the folder of the shards; ours alone: deleted after the build
# Tokens per byte of English, slightly overestimated (FineWeb-Edu: 0.35 as .parquet, 0.21 as .jsonl)
TOKENS_PER_BYTE = {".parquet": 0.375, ".jsonl": 0.25, ".json": 0.25, ".txt": 0.25, ".gz": 0.6, ".zst": 0.7, ".bin": 0.5}


def find_source(source, name=None, split="train", text_column="text", revision=None, split_on=None):
    """Return (what the manifest says of the source, its files, a function that opens it), without using the network.

    files: [{"file", "size", ...}] of local text, None for a data set of the hub. open(folder, manifest, keep) returns
    (what a new manifest says besides, paths); paths(first) yields (index, path) of the files from one on. A data set is
    opened as its manifest says, if there is one; it is downloaded into the folder, and kept there with `keep`.
    """
    for typed, meant in {r"\n": "\n", r"\t": "\t", r"\r": "\r", "\r\n": "\n"}.items():  # as a shell passes '\n'
        split_on = split_on and split_on.replace(typed, meant)
    missing = source != "demo" and why_missing(expand(source))
    if not missing:
        if name or revision:
            raise UserError(f"--name and --revision are for data sets on the hub, which {source} is not: omit them")
        if source != "demo":
            return local_source(Path(expand(source)), text_column, split_on)
        about = {"source": "demo", "revision": f"Python {sys.version.split()[0]}, NumPy {np.__version__}"}
        files = [{"file": "demo", "tokens": 1_000_000}]
        return about, files, lambda folder, manifest, keep: ({"files": files}, lambda first: [(0, None)][first:])
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or format_of(source):
        raise UserError(
            f"no file or folder {source:.300} ({missing}); a Hugging Face data set is written owner/name, like "
            f"{FINEWEB_EDU}"
        )
    if source in (FINEWEB_EDU, "HuggingFaceFW/fineweb"):
        name = name or "sample-10BT"  # all of it is a thousand times as much
    else:
        say(f"there is no file or folder {source} here: using the data set of that name on the hub")
    revision = revision or (FINEWEB_EDU_REVISION if source == FINEWEB_EDU else "main")

    def open_source(folder, manifest, keep):
        if manifest:
            commit, files = manifest["revision"], manifest["files"]
        else:
            commit, files = hub.list_files(source, revision, name, split)
            if split_on and not any(format_of(file["file"]) == "txt" for file in files):
                raise UserError(f"--split_on {split_on!r} is for .txt files, but {source} has none: omit it")
        more = {"revision": commit, "files": files}
        return more, lambda first: hub.fetch_in_turn(source, commit, files, folder, first, keep)

    about = dict(source=source, name=name, split=split, asked_revision=revision, text_column=text_column)
    return {**about, "split_on": split_on}, None, open_source


def estimate_tokens(files):
    """Estimate the number of tokens of the files: for the size of a shard, the disk needed and the time left."""
    return int(sum(f.get("tokens") or f["size"] * TOKENS_PER_BYTE[Path(f["file"]).suffix.lower()] for f in files))


def check_disk(out, manifest, files, keep):
    """Raise UserError if the disk has no room for the shards still to be made and the files still to be fetched."""
    need = 2 * max(0, estimate_tokens(files) - sum(s["tokens"] for s in manifest["shards"]) if manifest else 0)
    fetched = [f["size"] for f in files if "hash" in f and not (out / DOWNLOADS / f["file"]).exists()]
    need += sum(fetched if keep else sorted(fetched)[-2:])  # without `keep`, one or two at a time
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())).free
    if need > free:
        raise UserError(
            f"{out} needs {need / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free: make room, or choose another "
            "--out"
        )
    if need > 1e8:
        say(f"{out} needs about {need / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")
