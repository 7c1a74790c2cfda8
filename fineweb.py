"""
Text in, GPT-2 token shards out: the data half of the GPT-2 reproduction.

    python fineweb.py                                       # FineWeb-Edu sample-10BT -> edu_fineweb10B/
    python fineweb.py --source my_texts/ --out my_data      # your own .parquet, .jsonl or .txt files
    python fineweb.py --source demo --out demo_data         # the docs of Python and NumPy, no network

A shard is a one-dimensional .npy file of little-endian uint16: every document is <|endoftext|> (50256) followed by
its tokens, and documents continue from one shard into the next. Shard 000000 is the validation split. manifest.json
beside them says what they were made from, with the token count and sha256 of each.

After an interruption, even a kill -9, the same command resumes after the last finished shard and ends with the same
bytes. Files from the hub are fetched one ahead, verified, and deleted once they are tokenized.
"""

import argparse
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from lib.console import UserError, run_as_command, say
from lib.data.folder import is_built
from lib.data.local import check_texts
from lib.data.manifest import find_manifest, read_manifest, write_manifest, write_shard
from lib.data.progress import Progress
from lib.data.readers import More, documents_of, format_of
from lib.data.ready_made import copy_shards
from lib.data.shards import FINEWEB_EDU, name_shard
from lib.data.sources import DOWNLOADS, check_disk, estimate_tokens, find_source
from lib.files import expand, lock_folder
from lib.tokenizer import EOT, encode, get_tokenizer

# the CPUs that this process may use, often not all of a cluster's machine; about 12 workers keep the parent busy
WORKERS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())

# -----------------------------------------------------------------------------
# Documents to tokens


def start_worker():
    """Leave Ctrl-C to the parent, and exit when it does, even by kill -9: an orphan would wait for work forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def tokenize(texts):
    """Return (tokens of all texts as one uint16 array, number of documents, number of empty ones left out)."""
    parts, documents, empty = [np.empty(0, "<u2")], 0, 0
    for text in texts:
        if not isinstance(text, More):
            documents += bool(text)
            empty += not text
            parts.append([EOT] if text else [])
        parts.append(encode(text or ""))
    return np.concatenate(parts, dtype="<u2", casting="unsafe"), documents, empty


def chunks(paths, column, row, split_on):
    """Yield (index of the file, row, texts) of 256 documents, or fewer if they are long, since a pool that gets one
    document at a time spends most of its time on IPC. The texts may go on into the next files."""
    place, texts, length = None, [], 0
    for index, path in paths:
        for position, text in enumerate(documents_of(path, column, row, split_on), start=row):
            place = place or (index, position)
            texts.append(text)
            length += len(text or "")
            if len(texts) == 256 or length > 1_000_000:
                yield *place, texts
                place, texts, length = None, [], 0
        row = 0
    if texts:
        yield *place, texts


def tokenize_in_parallel(chunks, pool, workers):
    """Yield (file, row, *tokenize(texts)) of each chunk in order, so that the shards do not depend on the workers. What
    was read before an error is yielded first."""
    pending, failure = deque(), None
    try:
        for file, row, texts in chunks:
            pending.append((file, row, pool.submit(tokenize, texts)))
            if len(pending) == 8 * workers:  # bounds memory, and keeps workers busy while a shard is written
                file, row, future = pending.popleft()
                yield file, row, *future.result()
    except UserError as error:
        failure = error
    for file, row, future in pending:
        yield file, row, *future.result()
    if failure:
        raise failure


# -----------------------------------------------------------------------------
# Tokens to shards


def pack_shards(out, manifest, progress, paths, may_cut, pool, workers, bar):
    """Tokenize the files from `progress` on and write the shards.

    progress: where the last shard ends, `skip` tokens after the start of the document at a row of a file. Until all are
    written, the counts in the manifest are those up to that document. may_cut: whether text that ends within the
    validation shard may be cut into smaller shards.
    """
    shards, skip = manifest["shards"], progress["skip"]
    buffer, filled = np.empty(manifest["shard_size"], "<u2"), 0
    start = {**manifest, "progress": progress}

    def add_shard(tokens, progress):
        if not shards:
            write_manifest(out, start)  # first: shards without a manifest are not ours
        name = f"{name_shard(manifest['source'], len(shards))}.npy"
        shards.append(write_shard(out / name, lambda file: np.save(file, tokens)))
        if progress:
            write_manifest(out, manifest, progress=progress)

    how = manifest.get("text_column"), progress["row"], manifest.get("split_on")
    todo = chunks(paths(progress["file"]), *how)
    for file, row, tokens, documents, empty in tokenize_in_parallel(todo, pool, workers):
        taken = min(skip, len(tokens))
        new, skip = len(tokens) - taken, skip - taken
        while taken < len(tokens):
            if filled == len(buffer):
                add_shard(buffer, {"file": file, "row": row, "skip": taken})
                filled = 0
            count = min(len(tokens) - taken, len(buffer) - filled)
            buffer[filled : filled + count] = tokens[taken : taken + count]
            filled, taken = filled + count, taken + count
        manifest["documents"] += documents
        manifest["skipped_empty"] += empty
        manifest["tokens"] += len(tokens)
        bar.update(new, manifest, manifest["files"][file]["file"])
    if not shards:  # all of the text is in the buffer
        tenth = max(1, filled // 10)
        if not may_cut or filled < 2:
            raise UserError(
                f"{manifest['source']} has {filled:,} tokens, which leaves none for training after a validation shard "
                f"of {len(buffer):,}: provide more text, or give --shard_size {tenth}"
            )
        manifest["shard_size"] = tenth
    size, end = manifest["shard_size"], {"file": len(manifest["files"]), "row": 0, "skip": 0}
    for first in range(0, filled, size):  # several only when the text was cut; recorded together
        add_shard(buffer[first : min(first + size, filled)], end if first + size >= filled else None)


# -----------------------------------------------------------------------------
# The build


def build_shards(out, wanted, manifest, more, paths, pool, workers):
    """Make the shards that the manifest (None at first) does not list yet; returns the complete manifest.

    more: what a new manifest says besides `wanted`. paths(first): the (index, path) of the files from one on.
    """
    files, estimate = more["files"], estimate_tokens(more["files"])
    ready_made = files[0]["file"].endswith(".bin")
    if not manifest:
        manifest = {"version": 2, "shard_size": 0, **wanted, **more}
        if not (manifest["shard_size"] or ready_made):
            manifest["shard_size"] = max(1, min(100_000_000, estimate // 10))
            say(f"{out}: shards of {manifest['shard_size']:,} tokens, since the source has about {estimate:,}")
        manifest |= {"documents": 0, "skipped_empty": 0, "tokens": 0, "shards": [], "complete": False}
    done = sum(shard["tokens"] for shard in manifest["shards"])
    progress = manifest.pop("progress", {"file": 0, "row": 0, "skip": 0})
    if "version" not in manifest and progress["row"] and format_of(files[progress["file"]]["file"]) == "txt":
        progress = {"file": 0, "row": 0, "skip": done}  # the rows of a .txt were others
        manifest |= {"documents": 0, "skipped_empty": 0, "tokens": 0}
    bar = Progress(estimate, done)
    if ready_made:
        copy_shards(out, manifest, progress, paths, bar)
    else:
        pack_shards(out, manifest, progress, paths, "shard_size" not in wanted, pool, workers, bar)
    manifest["complete"] = True
    write_manifest(out, manifest)
    where = files[0]["file"] if len(files) == 1 else f"{len(files):,} files"
    if "sample" in files[0] and len(files) > 1:
        where += " in the order of a hash of their names"
    say(
        f"{out}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens in {len(manifest['shards'])} "
        f"shards; {manifest['skipped_empty']:,} documents without text left out; the first "
        f"{manifest['shards'][0]['tokens']:,} tokens of {where} are held out for validation"
    )
    return manifest


def build(
    source, out, shard_size=None, workers=None, start_method=None,
    name=None, split="train", text_column="text", revision=None, keep=False, verify=False, split_on=None,
):  # fmt: skip
    """Tokenize source into shards in the folder out and return its manifest. A finished folder is only checked, an
    unfinished one is continued after its last shard. shard_size defaults to a tenth of the tokens estimated from the
    sizes of the files, 100M at most. If another process builds in the folder, waits for it.

    Raises UserError for a source that cannot be read and for a folder that holds something else.
    """
    out, workers = Path(expand(out)), workers or WORKERS
    about, files, open_source = find_source(source, name, split, text_column, revision, split_on)
    wanted = {**about, "tokenizer": "gpt2"} | ({"shard_size": shard_size} if shard_size else {})
    manifest = find_manifest(out, wanted, files, verify)
    if manifest and manifest["complete"]:
        return manifest
    get_tokenizer()  # forked workers inherit it
    others = multiprocessing.active_children()
    try:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context(start_method), start_worker)
        pool.submit(len, "")  # starts the workers before there are threads, or a lock that they would inherit
    except OSError as error:
        for worker in set(multiprocessing.active_children()) - set(others):
            worker.terminate()
        raise UserError(
            f"cannot start {workers} worker processes: {error}. They need room for {workers} more processes (ulimit "
            "-u, or give fewer --workers) and, for their locks, a writable /dev/shm"
        ) from error
    try:
        with pool:
            more, paths = open_source(out / DOWNLOADS, manifest, keep)
            if not manifest:
                check_texts(files, paths, text_column, about.get("split_on"), pool)
            check_disk(out, manifest, more["files"], keep)
            with lock_folder(out, wait=True):
                if manifest != read_manifest(out):  # another process was at work
                    manifest = find_manifest(out, wanted, files, verify)
                    more, paths = open_source(out / DOWNLOADS, manifest, keep)
                if manifest and manifest["complete"]:
                    return manifest
                return build_shards(out, wanted, manifest, more, paths, pool, workers)
    except BrokenProcessPool as error:
        raise UserError(
            f"{error} Its own message, if it left one, is above. If there is none, it may have been killed for lack of "
            "memory: give fewer --workers. If it names the bootstrapping phase, call build() below "
            'if __name__ == "__main__"'
        ) from error


def build_missing(source, out):
    """Build the shards of a folder that is missing or unfinished, in a process of its own."""
    if not is_built(out):
        flags = ["--source", source, "--out", out]
        say(f"{out}/ is missing or unfinished, building it: python fineweb.py {shlex.join(flags)}")
        if subprocess.run([sys.executable, __file__, *flags]).returncode:
            raise UserError(f"building {out} failed, see above")


def main():
    parser = argparse.ArgumentParser(description="Tokenize text into shards for train_gpt2.py", allow_abbrev=False)
    flag = parser.add_argument
    flag("--source", default=FINEWEB_EDU, help="a Hugging Face data set, local files, a folder, or demo")
    flag("--out", default="edu_fineweb10B", help="folder of the shards (default: %(default)s)")
    flag("--shard_size", type=int, help="tokens per shard (default: a tenth of the source, 100M at most)")
    flag("--workers", type=int, default=WORKERS, help="processes (default: %(default)s)")
    flag("--name", help="configuration on the hub (default: sample-10BT for FineWeb and FineWeb-Edu)")
    flag("--split", default="train", help="split on the hub (default: %(default)s)")
    flag("--text_column", default="text", help="of .parquet and .jsonl (default: %(default)s)")
    flag("--revision", help="branch, tag or commit on the hub (default: FineWeb-Edu's is pinned, else main)")
    flag("--split_on", help=r"separator of the documents in a .txt, for example <|endoftext|> or \n\n")
    flag("--keep", action="store_true", help=f"keep the downloaded files, in {DOWNLOADS}/ of --out")
    flag("--verify", action="store_true", help="verify the sha256 of every existing shard")
    args = parser.parse_args()
    if args.workers < 1 or (args.shard_size is not None and not 1 <= args.shard_size <= 10**9):
        parser.error("--workers must be 1 or more, --shard_size from 1 to 1,000,000,000")
    interrupted = "interrupted: the same command resumes after the last finished shard"
    run_as_command(lambda: build(**vars(args)), interrupted=interrupted)


if __name__ == "__main__":
    main()
