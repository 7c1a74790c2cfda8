"""
What fineweb.py reads: the demo, local files of text, or a data set of the hub, each a list of files in a fixed order.
"""

import hashlib
import os
import re
import sys
from collections import Counter, deque
from pathlib import Path

import numpy as np

from lib.console import UserError, say
from lib.data import hub
from lib.data.readers import FORMATS, format_of
from lib.data.shards import FINEWEB_EDU
from lib.files import expand, why_missing
from lib.foreign import recognize

DOWNLOADS = ".fineweb_download"  # in the folder of the shards; ours alone: deleted after the build
FINEWEB_EDU_REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"  # pinned, since data sets on the hub change
# Tokens per byte of English, slightly overestimated (FineWeb-Edu: 0.35 as .parquet, 0.21 as .jsonl)
TOKENS_PER_BYTE = {".parquet": 0.375, ".jsonl": 0.25, ".json": 0.25, ".txt": 0.25, ".gz": 0.6, ".zst": 0.7}


def walk(root):
    """Return (the paths of the files of text at a path and below, sorted; how many others there are by reason). Links
    are followed. What is linked twice is read once: by its own name, if it is below the folder."""
    files, left_out, seen = [], Counter(), set()
    queue = deque([root])
    while queue:
        path = queue.popleft()
        place = os.path.realpath(path)
        if path != root and (path.name.startswith(".") or path.name == "__MACOSX"):  # editor and system files
            left_out["hidden"] += 1
        elif place in seen:
            left_out["linked twice"] += 1
        elif os.path.isdir(path):
            seen.add(place)
            for child in sorted(path.iterdir()):
                (queue.append if child.is_symlink() else queue.appendleft)(child)  # links last
        elif format_of(path.name) and path.name != "manifest.json":
            seen.add(place)
            files.append(path)
        else:  # manifest.json is ours, if --out is inside
            left_out["of another kind"] += 1
    text = [path for path in files if format_of(path.name) != "json"] or files  # beside text, .json is likely settings
    left_out["of another kind"] += len(files) - len(text)
    return sorted(text), left_out


def sample_hash(path):
    """The hash of a file's size and of four evenly spread pieces of 16 kB: detects other content at almost no cost."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        starts = [max(0, size - (16 << 10)) * i // 3 for i in range(4)]
        pieces = [os.pread(file.fileno(), 16 << 10, start) for start in starts]
    return hashlib.sha256(b"".join([str(size).encode(), *pieces])).hexdigest()


def find_files(root):
    """Return (what identifies the files of text at a path, [{"file", "size", "sample"}, ...] in the order of a hash of
    their names, so that the first shard is a sample of them). Reports what is left out. Raises UserError if there are
    no such files, and for one that cannot be read."""
    files, samples = [], []
    try:
        found, left_out = walk(root)
        for path in found:
            name = path.relative_to(root).as_posix() if path != root else path.name
            sample = sample_hash(path)
            samples.append((path.name, sample))
            files.append({"file": name, "size": path.stat().st_size, "sample": sample[:16]})
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}. Fix that, or move it elsewhere") from None
    others = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count) or "nothing"
    if not found:
        raise UserError(f"{root} holds no file that ends in {FORMATS}; left out: {others}{recognize(root)}")
    say(f"{root}: {sum(f['size'] for f in files):,} bytes of text (files: {len(files):,}); left out: {others}")
    files.sort(key=lambda file: hashlib.sha256(os.fsencode(file["file"])).digest())
    return {"source": str(root.resolve()), "revision": hashlib.sha256(repr(samples).encode()).hexdigest()}, files


def find_source(source, name=None, split="train", text_column="text", revision=None, split_on=None):
    """Return (what the manifest says of the source, its files [{"file", "size", ...}]), without using the network: the
    files of a data set of the hub are None."""
    if split_on == "":
        raise UserError("--split_on is empty: give the text that separates two documents, or omit it")
    for typed, meant in {r"\n": "\n", r"\t": "\t", r"\r": "\r", "\r\n": "\n"}.items():  # as a shell passes '\n'
        split_on = split_on and split_on.replace(typed, meant)
    missing = source != "demo" and why_missing(expand(source))
    if not missing and (name or revision):
        raise UserError(f"--name and --revision are for data sets on the hub, which {source} is not: omit them")
    if source == "demo":
        about = {"source": "demo", "revision": f"Python {sys.version.split()[0]}, NumPy {np.__version__}"}
        return about, [{"file": "demo", "tokens": 1_000_000}]
    if not missing:
        about, files = find_files(Path(expand(source)))
        return {**about, "text_column": text_column, "split_on": split_on}, files
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or format_of(source):
        raise UserError(f"no file or folder {source:.300} ({missing}); a data set of the hub is written owner/name")
    if source in (FINEWEB_EDU, "HuggingFaceFW/fineweb"):
        name = name or "sample-10BT"  # all of it is a thousand times as much
    else:
        say(f"there is no file or folder {source} here: using the data set of that name on the hub")
    revision = revision or (FINEWEB_EDU_REVISION if source == FINEWEB_EDU else "main")
    about = dict(source=source, name=name, split=split, asked_revision=revision, text_column=text_column)
    return {**about, "split_on": split_on}, None


def open_source(source, about, files, manifest, out):
    """Return (what a new manifest says besides `about`, paths); paths(first) yields (index, path) of the files from one
    on. Those of the hub are the manifest's, if there is one, and are downloaded below `out`."""
    if source == "demo":
        return {"files": files}, lambda first: [(0, None)][first:]
    if files:
        if manifest and "version" not in manifest:  # builds once went by path
            files = sorted(files, key=lambda file: Path(file["file"]))
        root = Path(expand(source))
        paths = [root / file["file"] if root.is_dir() else root for file in files]
        return {"files": files}, lambda first: list(enumerate(paths))[first:]
    if manifest:
        commit, files = manifest["revision"], manifest["files"]
    else:
        commit, files = hub.list_files(source, about["asked_revision"], about["name"], about["split"])
        if about["split_on"] and not any(format_of(file["file"]) == "txt" for file in files):
            raise UserError(f"--split_on {about['split_on']!r} is for .txt files, but {source} has none: omit it")
    more = {"revision": commit, "files": files}
    return more, lambda first: hub.fetch_in_turn(source, commit, files, out / DOWNLOADS, first)


def estimate_tokens(files):
    """Estimate the number of tokens of the files: for the size of a shard, and the progress."""
    return int(sum(f.get("tokens") or f["size"] * TOKENS_PER_BYTE[Path(f["file"]).suffix.lower()] for f in files))
