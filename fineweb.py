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

import lib.start  # noqa: F401 - Ctrl-C during the imports below ends the program at once

import argparse
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from lib.console import UserError, run_as_command, say
from lib.data.manifest import find_manifest, read_manifest, write_manifest, write_shard
from lib.data.readers import More, check_texts, documents_of, format_of
from lib.data.shards import FINEWEB_EDU, name_shard, split_of
from lib.data.sources import estimate_tokens, find_source, open_source
from lib.files import expand, list_folder, lock_folder
from lib.tokenizer import EOT, encode, get_tokenizer

# the CPUs that this process may use, often not all of a cluster's machine; about 12 workers keep the parent busy
WORKERS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())

# -----------------------------------------------------------------------------
# Text to shards


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
                file, row, future = pending[0]
                yield file, row, *future.result()
                pending.popleft()  # not before: nothing may follow a chunk that failed
    except UserError as error:
        failure = error
    for file, row, future in pending:
        yield file, row, *future.result()
    if failure:
        raise failure


def pack_shards(out, manifest, progress, paths, estimate, may_cut, pool, workers):
    """Tokenize the files from `progress` on and write the shards. may_cut: whether text that ends within the validation
    shard may be cut into smaller shards. progress: where the last shard ends, `skip` tokens after the start of the
    document at a row of a file. Until all are written, the counts in the manifest are those up to that document."""
    shards = manifest["shards"]
    skip = progress["skip"]
    buffer = np.empty(manifest["shard_size"], "<u2")
    filled = 0
    start = {**manifest, "progress": progress}
    before = sum(shard["tokens"] for shard in shards)
    begin = time.monotonic()

    def add_shard(tokens, progress):
        if not shards:
            write_manifest(out, start)  # first: shards without a manifest are not ours
        name = f"{name_shard(manifest['source'], len(shards))}.npy"
        shards.append(write_shard(out / name, tokens))
        if progress:
            write_manifest(out, manifest, progress=progress)
        done = sum(shard["tokens"] for shard in shards)
        speed = (done - before) / (time.monotonic() - begin) / 1e6
        say(f"{name}: {done:,} of about {estimate:,} tokens, {speed:.1f}M tokens/s", sys.stderr)

    todo = chunks(paths(progress["file"]), manifest.get("text_column"), progress["row"], manifest.get("split_on"))
    for file, row, tokens, documents, empty in tokenize_in_parallel(todo, pool, workers):
        taken = min(skip, len(tokens))
        skip -= taken
        while taken < len(tokens):
            if filled == len(buffer):
                add_shard(buffer, {"file": file, "row": row, "skip": taken})
                filled = 0
            count = min(len(tokens) - taken, len(buffer) - filled)
            buffer[filled : filled + count] = tokens[taken : taken + count]
            filled += count
            taken += count
        manifest["documents"] += documents
        manifest["skipped_empty"] += empty
        manifest["tokens"] += len(tokens)
    if not shards:  # all of the text is in the buffer
        tenth = max(1, filled // 10)
        if not may_cut or filled < 2:
            raise UserError(f"{filled:,} tokens leave none for training: add text, or give --shard_size {tenth}")
        manifest["shard_size"] = tenth
    size = manifest["shard_size"]
    end = {"file": len(manifest["files"]), "row": 0, "skip": 0}
    for first in range(0, filled, size):  # several only when the text was cut; recorded together
        add_shard(buffer[first : min(first + size, filled)], end if first + size >= filled else None)


# -----------------------------------------------------------------------------
# The build


def build_shards(out, wanted, manifest, more, paths, pool, workers):
    """Make the shards that the manifest (None at first; a new one has `wanted` and `more`) does not list yet; returns
    the complete manifest. paths(first): the (index, path) of the files from one on."""
    files = more["files"]
    estimate = estimate_tokens(files)
    progress = manifest.pop("progress") if manifest else {"file": 0, "row": 0, "skip": 0}
    if not manifest:
        manifest = {"version": 3, "shard_size": 0, **wanted, **more}
        if not manifest["shard_size"]:
            manifest["shard_size"] = max(1, min(100_000_000, estimate // 10))
            say(f"{out}: shards of {manifest['shard_size']:,} tokens, since the source has about {estimate:,}")
        manifest |= {"documents": 0, "skipped_empty": 0, "tokens": 0, "shards": [], "complete": False}
    if manifest.get("version") != 3 and progress["row"] and format_of(files[progress["file"]]["file"]) == "txt":
        progress = {"file": 0, "row": 0, "skip": sum(shard["tokens"] for shard in manifest["shards"])}
        manifest |= {"documents": 0, "skipped_empty": 0, "tokens": 0}  # the rows of a .txt were others
    pack_shards(out, manifest, progress, paths, estimate, "shard_size" not in wanted, pool, workers)
    manifest["complete"] = True
    write_manifest(out, manifest)
    found = f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens in {len(manifest['shards'])} shards"
    left_out = f"{manifest['skipped_empty']:,} documents without text left out"
    held_out = f"the first {manifest['shards'][0]['tokens']:,} tokens, in the order of the files in manifest.json"
    say(f"{out}: {found}; {left_out}; held out for validation: {held_out}")
    return manifest


def build(
    source, out, shard_size=None, workers=None, start_method=None,
    name=None, split="train", text_column="text", revision=None, verify=False, split_on=None,
):  # fmt: skip
    """Tokenize source into shards in the folder out and return its manifest. A finished folder is only checked, an
    unfinished one is continued after its last shard. shard_size defaults to a tenth of the estimated tokens, 100M at
    most. Raises UserError for a source that cannot be read, and for a folder that holds something else."""
    out, workers = Path(expand(out)), workers or WORKERS
    about, files = find_source(source, name, split, text_column, revision, split_on)
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
            worker.kill()
            worker.join()
        limits = "check ulimit -u, and that /dev/shm, which has their locks, is writable"
        raise UserError(f"cannot start {workers} worker processes: {error}; {limits}") from error
    try:
        with pool:
            more, paths = open_source(source, about, files, manifest, out)
            if not manifest and files and source != "demo":
                check_texts([path for _, path in paths(0)], text_column, about["split_on"], pool)
            with lock_folder(out, wait=True):
                if manifest == read_manifest(out):
                    return build_shards(out, wanted, manifest, more, paths, pool, workers)
    except BrokenProcessPool as error:
        raise UserError("a worker process ended; if no message says why, try fewer --workers") from error
    # another process was at work meanwhile
    return build(source, out, shard_size, workers, start_method, name, split, text_column, revision, verify, split_on)


def build_missing(source, out):
    """Build the shards of a folder that is missing or unfinished, in a process of its own. Raises UserError if it holds
    other files."""
    manifest = read_manifest(out)
    names = [path.name for path in list_folder(out)]
    if manifest["complete"] if manifest else any(map(split_of, names)):
        return  # shards without a manifest are another program's, and complete
    if not manifest and any(name != "lock" and name[0] != "." and not name.endswith(".tmp") for name in names):
        raise UserError(f"{out}/ holds other files and no shards: build them with python fineweb.py")
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
    flag("--verify", action="store_true", help="verify the sha256 of every existing shard")
    args = parser.parse_args()
    if args.workers < 1 or (args.shard_size is not None and not 1 <= args.shard_size <= 10**9):
        parser.error("--workers must be 1 or more, --shard_size from 1 to 1,000,000,000")
    interrupted = "interrupted: the same command resumes after the last finished shard"
    run_as_command(lambda: build(**vars(args)), interrupted=interrupted)


if __name__ == "__main__":
    main()
