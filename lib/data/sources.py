"""
What fineweb.py reads: the demo corpus, local files of text, and data sets of the Hugging Face hub.

A source is a list of files in a fixed order.
"""

import hashlib
import os
import re
import stat
import sys
from collections import Counter, deque
from pathlib import Path

import numpy as np

from lib.console import UserError, say
from lib.data import hub
from lib.data.readers import FORMATS, LFS_POINTER, format_of
from lib.data.shards import FINEWEB_EDU
from lib.files import sample_hash

FINEWEB_EDU_REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"  # pinned, since data sets on the hub change


def hidden(name):
    """Whether a name is an editor's or a system's, such as .ipynb_checkpoints, ._x or __MACOSX: never training text."""
    return name.startswith(".") or name == "__MACOSX"


def walk(root):
    """Yield (path, os.stat's result) for each file of text in a folder and below, and (path, reason in words) for what
    is left out, in no fixed order. Links to folders are followed, each folder once, since links may form a cycle."""
    folders, links, seen = deque([root]), deque(), set()
    while folders or links:  # links last: a folder is found under its own name
        folder = folders.popleft() if folders else links.popleft()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                yield folder, "linked twice"
                continue
            seen.add((status.st_dev, status.st_ino))
            paths = [folder / name for name in os.listdir(folder)]
        except PermissionError as error:
            yield folder, error.strerror
            continue
        for path in paths:
            if hidden(path.name):
                yield path, "hidden"
                continue
            try:
                status = path.stat()
            except PermissionError as error:  # some folders can be listed but not entered
                yield path, error.strerror
                continue
            except OSError:  # a broken link
                if format_of(path.name):
                    raise
                status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                (links if path.is_symlink() else folders).append(path)
            else:
                is_text = format_of(path.name) and stat.S_ISREG(status.st_mode)
                yield path, status if is_text else "of another kind"


def find_files(root):
    """The files of text at a path, in order, with their sizes. Prints in one line what is taken and what is left out.

    Raises UserError if there are none, and for one that cannot be read.
    """
    try:
        if root.is_dir():
            found = list(walk(root))
        else:
            found = [(root, root.stat() if format_of(root.name) else "of another kind")]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}. Fix that, or move it elsewhere") from None
    left_out = [(path, reason) for path, reason in found if isinstance(reason, str)]
    files = {path: status for path, status in found if not isinstance(status, str)}
    taken, seen, is_json = {}, set(), {path: format_of(path.name) == "json" for path in files}
    for path in sorted(files, key=lambda path: (path.is_symlink(), path)):
        place = files[path].st_dev, files[path].st_ino
        if path.is_symlink() and place in seen:
            left_out.append((path, "linked twice"))
        elif is_json[path] and not all(is_json.values()):  # more likely settings than text
            left_out.append((path, "of another kind"))
        else:
            seen.add(place)
            taken[path] = files[path].st_size
    counts = Counter(reason for _, reason in left_out if reason in ("hidden", "of another kind", "linked twice"))
    reasons = [f"{count:,} {reason}" for reason, count in counts.items()]
    reasons += [f"{path} ({reason})" for path, reason in left_out if reason not in counts]
    left_out = f"left out: {', '.join(reasons[:9]) or 'nothing'}{' and more' if len(reasons) > 9 else ''}"
    if not taken:
        raise UserError(f"{root} holds no file that ends in {FORMATS}; {left_out}")
    say(f"{root}: {len(taken):,} files taken, {sum(taken.values()):,} bytes; {left_out}")
    return dict(sorted(taken.items()))


def refuse_pointers(files):
    """Raise UserError if a file is only a git-LFS pointer, a few lines in place of its content."""
    for path, size in files.items():
        if size < 1024:
            with open(path, "rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise UserError(
                        f"{path} is only a git-LFS pointer to the text: run git lfs pull in its folder first"
                    )


def find_source(source, name=None, split="train", text_column="text", revision=None, split_on=None):
    """Return (what the manifest says of the source, a function that opens it), without using the network.

    open(folder, manifest, keep) returns (commit, files, paths); paths(first) yields (index, path) of the files from
    one on. A data set is opened as its manifest says, if there is one; it is downloaded into the folder, and kept there
    with `keep`.
    """
    path = Path(os.path.expanduser(source))
    try:
        exists = bool(source) and path.exists()
    except (OSError, ValueError) as error:  # no permission, a name that is too long
        raise UserError(f"cannot read {source:.300}: {error}") from None
    if (source == "demo" or exists) and (name or revision):
        raise UserError(f"--name and --revision are for data sets on the hub, which {source} is not: leave them out")
    if source == "demo":
        about = {"source": "demo", "revision": f"Python {sys.version.split()[0]}, NumPy {np.__version__}"}
        files = [{"file": "demo", "tokens": 1_000_000}]
        return about, lambda folder, manifest, keep: (None, files, lambda first: [(0, None)][first:])
    if exists:
        sizes = find_files(path)
        paths = list(sizes)
        samples = hashlib.sha256(repr([(p.name, sample_hash(p)) for p in paths]).encode()).hexdigest()
        refuse_pointers(sizes)
        files = [{"file": p.name, "size": size} for p, size in sizes.items()]
        check_split_on(split_on, files)
        about = {"source": str(path.resolve()), "revision": samples, "text_column": text_column, "split_on": split_on}
        return about, lambda folder, manifest, keep: (None, files, lambda first: list(enumerate(paths))[first:])
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or format_of(source):
        raise UserError(
            f"no file or folder {source}; a Hugging Face data set is written owner/name, like {FINEWEB_EDU}"
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
            check_split_on(split_on, files)
        return commit, files, lambda first: hub.fetch_in_turn(source, commit, files, folder, first, keep)

    about = dict(source=source, name=name, split=split, asked_revision=revision, text_column=text_column)
    return {**about, "split_on": split_on}, open_source


def check_split_on(split_on, files):
    if split_on and not any(format_of(file["file"]) == "txt" for file in files):
        raise UserError(f"--split_on {split_on!r} is for .txt files, but there are none: leave it out")
