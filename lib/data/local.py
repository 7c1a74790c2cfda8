"""
Local files of text: found, identified and checked before they are read.
"""

import hashlib
import itertools
import os
import stat
from collections import Counter, deque

from lib.console import UserError, say
from lib.data.readers import FORMATS, count_files, format_of, inspect


def walk(root, left_out):
    """The files of text in a folder and below, with os.stat's results. Counts by reason what is left out.

    Links are followed. What is linked twice is read once: by its own name, if it is below the folder.
    """
    files, seen = {}, set()
    folders = deque([root])
    while folders:
        folder = folders.popleft()
        if (place := os.path.realpath(folder)) in seen:
            left_out["linked twice"] += 1
            continue
        seen.add(place)
        for name in sorted(os.listdir(folder)):
            path = folder / name
            if name.startswith(".") or name == "__MACOSX":  # editor and system files
                left_out["hidden"] += 1
            elif name == "manifest.json":  # ours, if --out is inside
                left_out["of another kind"] += 1
            elif os.path.isdir(path):
                (folders.append if path.is_symlink() else folders.appendleft)(path)  # links last
            elif format_of(name) and stat.S_ISREG((status := path.stat()).st_mode):
                files[path] = status
            else:
                left_out["of another kind"] += 1
    seen = set()
    for path in sorted(files, key=lambda path: (path.is_symlink(), path)):
        place = files[path].st_dev, files[path].st_ino
        if path.is_symlink() and place in seen:
            left_out["linked twice"] += 1
            del files[path]
        seen.add(place)
    return files


def find_files(root):
    """The files of text at a path, sorted, with their sizes; prints how many are taken and what is left out.

    Raises UserError if there are none, and for one that cannot be read.
    """
    left_out = Counter()
    try:
        files = walk(root, left_out) if root.is_dir() else {root: root.stat()}
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}. Fix that, or move it elsewhere") from None
    kinds = {path: format_of(path.name) for path in files}
    if set(kinds.values()) > {"json"}:  # beside other text, more likely settings than text
        kinds = {path: kind for path, kind in kinds.items() if kind != "json"}
        left_out["of another kind"] += len(files) - len(kinds)
    taken = {path: files[path].st_size for path in sorted(kinds) if kinds[path]}
    others = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count) or "nothing"
    if not taken:
        raise UserError(f"{root} holds no file that ends in {FORMATS}; left out: {others}")
    say(f"{root}: {count_files(taken)} taken, {sum(taken.values()):,} bytes; left out: {others}")
    return taken


def sample_hash(path):
    """The hash of a file's size and of four evenly spread pieces of 16 kB: detects other content at almost no cost."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(str(size).encode())
        for i in range(4):
            file.seek(max(0, size - (16 << 10)) * i // 3)
            digest.update(file.read(16 << 10))
    return digest.hexdigest()


def local_source(root, text_column, split_on):
    """A file, or a folder of files in the order of a hash of their paths: the first shard is a sample of them."""
    paths, files = [], []
    sizes = find_files(root)
    try:
        samples = {path: sample_hash(path) for path in sizes}
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}. Fix its permissions, or delete it") from None
    names = {path: path.relative_to(root).as_posix() if path != root else path.name for path in sizes}
    hashes = {path: hashlib.sha256(os.fsencode(name)).digest() for path, name in names.items()}
    for path in sorted(sizes, key=hashes.get):
        paths.append(path)
        files.append({"file": names[path], "size": sizes[path], "sample": samples[path][:16]})
    revision = hashlib.sha256(repr([(path.name, samples[path]) for path in sizes]).encode()).hexdigest()

    def open_source(folder, manifest, keep):
        in_order = list(sizes) if manifest and "version" not in manifest else paths  # builds once went by path
        return {"files": files}, lambda first: list(enumerate(in_order))[first:]

    about = {"source": str(root.resolve()), "revision": revision, "text_column": text_column, "split_on": split_on}
    return about, files, open_source


def check_texts(files, paths, column, split_on, pool):
    """Read all local files before anything is built. Raises UserError that names all that cannot be used, or if there
    is no text, or the separator never occurs."""
    if not files or "sample" not in files[0]:
        return
    paths = [path for _, path in paths(0)]
    found = list(pool.map(inspect, paths, *map(itertools.repeat, (column, split_on)), chunksize=1 + len(paths) // 256))
    if faults := [fault for _, fault, _ in found if fault]:
        count = f"{len(faults):,} of {len(paths):,} files cannot be used:\n  " if len(paths) > 1 else ""
        raise UserError(count + "\n  ".join(faults[:20] + ["..."] * (len(faults) > 20)))
    if not any(documents for documents, _, _ in found):
        names = next((f": choose --text_column from {names}" for _, _, names in found if names), "")
        raise UserError(f'no file has text, or none has it in "{column}"{names}')
    texts = [documents for path, (documents, _, _) in zip(paths, found, strict=True) if format_of(path.name) == "txt"]
    if split_on and sum(texts) <= len(texts):
        raise UserError(f"--split_on {split_on!r} never occurs between two texts of a .txt: check its spelling")
