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
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from lib.console import UserError, run_as_command, say
from lib.data.manifest import (
    DOWNLOADS,
    check_disk,
    estimate_tokens,
    find_manifest,
    read_manifest,
    removed_if_empty,
    write_manifest,
)
from lib.data.progress import Progress
from lib.data.readers import More, documents_of
from lib.data.ready_made import place_shards
from lib.data.shards import FINEWEB_EDU, name_shard
from lib.data.sources import find_source
from lib.files import atomic_write, hash_file, lock_folder
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
    start, parts, documents, empty = np.array([EOT], np.uint32), [], 0, 0
    for index, text in enumerate(texts):
        begins = not isinstance(text, More)
        if text:
            try:
                parts += [start, encode(text)] if begins else [encode(text)]
            except UserError as error:
                error.index = index
                raise
        documents += bool(text) and begins
        empty += not text and begins
    tokens = np.concatenate(parts) if parts else np.empty(0)
    return tokens.astype("<u2"), documents, empty


def chunks(paths, column, row, split_on):
    """Yield (places, texts) of 256 documents, or fewer if they are long, since a pool that gets one document at a time
    spends most of its time on passing them. A place is (index of the file, row, path)."""
    places, texts, length = [], [], 0
    for index, path in paths:
        for position, text in enumerate(documents_of(path, column, row, split_on), start=row):
            places.append((index, position, path))
            texts.append(text)
            length += len(text or "")
            if len(texts) == 256 or length > 1_000_000:
                yield places, texts
                places, texts, length = [], [], 0
        row = 0
    if texts:
        yield places, texts


def tokenize_in_parallel(chunks, pool, workers):
    """Yield (file, row, *tokenize(texts)) of each chunk in order, so that the shards do not depend on the workers.

    What was read before an error is yielded first, then the error is raised.
    """
    pending = deque()

    def submit(count):
        try:
            for places, texts in itertools.islice(chunks, count):
                pending.append((places, pool.submit(tokenize, texts)))
        except UserError as error:
            pending.append(([], Future()))
            pending[-1][1].set_exception(error)

    submit(8 * workers)  # bounded, whatever the source, and enough to work on while a shard is written
    while pending:
        places, future = pending.popleft()
        try:
            result = future.result()
        except UserError as error:
            if not hasattr(error, "index"):
                raise
            _, row, path = places[error.index]
            raise UserError(f"{path}, row {row + 1}: {error}; delete it and build the rest in a new --out") from None
        yield *places[0][:2], *result
        submit(1)


# -----------------------------------------------------------------------------
# Tokens to shards


def pack_shards(out, manifest, progress, paths, may_cut, pool, workers, bar):
    """Tokenize the files from `progress` on and write the shards.

    progress: where the last shard ends, `skip` tokens after the start of the document at a row of a file. Until all are
    written, the counts in the manifest are those up to that document. may_cut: whether text that ends within the
    validation shard may be cut into smaller shards.
    """
    shards, skip = manifest["shards"], progress["skip"]
    start, end = {**manifest, "progress": progress}, {"file": len(manifest["files"]), "row": 0, "skip": 0}
    buffer, filled = np.empty(manifest["shard_size"], "<u2"), 0
    listed, waiting = 0, 0  # bytes of the manifest, and of the shards that are not in it yet

    def add_shard(tokens, progress):
        nonlocal listed, waiting
        if not shards:
            listed = write_manifest(out, start)  # first: shards without a manifest are not ours
        path = out / f"{name_shard(manifest['source'], len(shards))}.npy"
        with atomic_write(path) as file:
            np.save(file, tokens)
        shards.append({"file": path.name, "tokens": len(tokens), "sha256": hash_file(path)})
        waiting += tokens.nbytes
        if progress and waiting >= listed - 1_000_000:  # seldom: with 100,000 small files it is large
            listed, waiting = write_manifest(out, manifest, progress=progress), 0

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
    size = manifest["shard_size"]
    for first in range(0, filled, size):  # several only if it is cut; listed once all are written
        add_shard(buffer[first : min(first + size, filled)], end if first + size >= filled else None)


def build_shards(out, wanted, manifest, open_source, pool, workers, keep):
    """Make the shards that the manifest (None at first) does not list yet; returns the complete manifest."""
    commit, files, paths = open_source(out / DOWNLOADS, manifest, keep)
    estimate, ready_made = estimate_tokens(files), files[0]["file"].endswith(".bin")
    if not manifest:
        manifest = {"shard_size": 0, **wanted, "revision": commit or wanted["revision"], "files": files}
        if not (manifest["shard_size"] or ready_made):
            manifest["shard_size"] = max(1, min(100_000_000, estimate // 10))
            say(f"{out}: shards of {manifest['shard_size']:,} tokens, since the source has about {estimate:,}")
        manifest |= {"documents": 0, "skipped_empty": 0, "tokens": 0, "shards": [], "complete": False}
    progress = manifest.pop("progress", {"file": 0, "row": 0, "skip": 0})
    check_disk(out, manifest, estimate, keep)
    done = sum(shard["tokens"] for shard in manifest["shards"])
    with Progress(estimate, done) as bar:
        if ready_made:
            place_shards(out, manifest, progress, paths, bar)
        else:
            pack_shards(out, manifest, progress, paths, "shard_size" not in wanted, pool, workers, bar)
    manifest["complete"] = True
    write_manifest(out, manifest)
    say(
        f"{out}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens in "
        f"{len(manifest['shards'])} shards; {manifest['skipped_empty']:,} empty documents left out"
    )
    return manifest


def build(
    source, out, shard_size=None, workers=None, start_method=None,
    name=None, split="train", text_column="text", revision=None, keep=False, verify=False, split_on=None,
):  # fmt: skip
    """Tokenize source into shards in the folder out and return its manifest. A finished folder is only checked, an
    unfinished one is continued after its last shard. shard_size defaults to a tenth of the tokens estimated from the
    sizes of the files, 100M at most.

    Raises UserError for a source that cannot be read and for a folder that holds something else.
    """
    out, workers = Path(os.path.expanduser(out)), workers or WORKERS
    about, open_source = find_source(source, name, split, text_column, revision, split_on)
    wanted = {**about, "tokenizer": "gpt2"} | ({"shard_size": shard_size} if shard_size else {})
    manifest = find_manifest(out, wanted, verify)
    if manifest and manifest["complete"]:
        return manifest
    get_tokenizer()  # forked workers inherit it
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context(start_method), start_worker) as pool:
            pool.submit(len, "")  # starts the workers before there are threads, or a lock that they would inherit
            with lock_folder(out), removed_if_empty(out):
                if manifest != read_manifest(out):  # another process has just finished
                    manifest = find_manifest(out, wanted)
                if manifest and manifest["complete"]:
                    return manifest
                return build_shards(out, wanted, manifest, open_source, pool, workers, keep)
    except BrokenProcessPool:
        raise UserError("a worker died, most likely for lack of memory: start again with fewer --workers") from None
    except OSError as error:  # such as a full disk
        raise UserError(f"cannot write {out}: {error}; start again to resume after the last finished shard") from error


def main():
    parser = argparse.ArgumentParser(
        description="Tokenize text into uint16 shards for train_gpt2.py", allow_abbrev=False
    )
    parser.add_argument("--source", default=FINEWEB_EDU, help="a Hugging Face data set, local files, a folder, or demo")
    parser.add_argument("--out", default="edu_fineweb10B", help="folder of the shards (default: %(default)s)")
    parser.add_argument("--shard_size", type=int, help="tokens a shard (default: a tenth of the source, 100M at most)")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes (default: %(default)s)")
    parser.add_argument("--name", help="configuration on the hub (default: sample-10BT for FineWeb and FineWeb-Edu)")
    parser.add_argument("--split", default="train", help="split on the hub (default: %(default)s)")
    parser.add_argument("--text_column", default="text", help="of .parquet and .jsonl (default: %(default)s)")
    parser.add_argument(
        "--revision", help="branch, tag or commit on the hub (default: FineWeb-Edu's is pinned, else main)"
    )
    parser.add_argument("--split_on", help="separator of the documents in a .txt, for example <|endoftext|>")
    parser.add_argument("--keep", action="store_true", help=f"keep the downloaded files, in {DOWNLOADS}/ of --out")
    parser.add_argument("--verify", action="store_true", help="verify the sha256 of every existing shard")
    args = parser.parse_args()
    if args.workers < 1 or (args.shard_size is not None and not 1 <= args.shard_size <= 10**9):
        parser.error("--workers must be 1 or more, --shard_size from 1 to 1,000,000,000")
    interrupted = "interrupted: the same command resumes after the last finished shard"
    run_as_command(lambda: build(**vars(args)), interrupted=interrupted)


if __name__ == "__main__":
    main()
