"""
Text in, GPT-2 token shards out: the data half of the GPT-2 reproduction.

    python fineweb.py                                       # FineWeb-Edu sample-10BT -> edu_fineweb10B/
    python fineweb.py --source my_texts/ --out my_data      # your own .parquet, .jsonl or .txt files
    python fineweb.py --source demo --out demo_data         # the docs of Python and NumPy, no network

A shard is a one-dimensional .npy file of little-endian uint16: every document is <|endoftext|> (50256) followed by
its tokens, and documents run on from one shard into the next. Shard 000000 is the validation split. manifest.json
beside them says what they were made from, with the token count and sha256 of each.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import re
import sys
import sysconfig
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from tools.common import EOT, SHARD_NAME, InputError, atomic_write, front_door, get_tokenizer, read_manifest

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"  # pinned: the hub's data sets change
TEXT_SUFFIXES = {".parquet", ".jsonl", ".txt"}

# -----------------------------------------------------------------------------
# Sources: each yields documents as str (None where a row of a table has no text)


def demo_documents():
    """The manual pages and docstrings that are installed with Python and NumPy, shuffled with a fixed seed."""
    from pydoc_data.topics import topics

    texts = list(topics.values())
    numpy_folder = importlib.util.find_spec("numpy").submodule_search_locations[0]
    for folder in (Path(sysconfig.get_paths()["stdlib"]), Path(numpy_folder)):
        for path in sorted(folder.rglob("*.py")):
            if {"site-packages", "dist-packages", "test", "tests"} & set(path.relative_to(folder).parts):
                continue
            with contextlib.suppress(SyntaxError, UnicodeDecodeError):  # Python ships a few files broken on purpose
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                        texts.append(ast.get_docstring(node) or "")
    # one-liners teach little; a docstring inherited by copying must not stand in both splits
    texts = list(dict.fromkeys(text for text in texts if len(text) >= 200))
    random.Random(1337).shuffle(texts)
    return texts


def file_documents(path):
    """The documents of one local file: rows of a .parquet or .jsonl with a "text" column, or a whole .txt."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            with pyarrow.parquet.ParquetFile(path) as table:
                if "text" not in table.schema_arrow.names:
                    raise InputError(f'{path} has no "text" column; its columns are {table.schema_arrow.names}')
                for batch in table.iter_batches(batch_size=1024, columns=["text"]):
                    yield from batch.column(0).to_pylist()
        elif path.suffix == ".jsonl":
            with open(path, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        yield json.loads(line.decode("utf-8"))["text"]
                    except (ValueError, KeyError, TypeError) as error:
                        raise InputError(
                            f'{path}, line {number} has no "text" string: {error!r}; mend it or delete it'
                        ) from None
        else:
            yield path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}: convert it, for instance with iconv") from None
    except InputError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        raise InputError(f"cannot read {path}: {error}") from None


def hub_documents(name, revision):
    """The documents of a Hugging Face data set, streamed."""
    from datasets import load_dataset

    config = "sample-10BT" if name == FINEWEB_EDU else None
    try:
        for row in load_dataset(name, name=config, split="train", streaming=True, revision=revision):
            yield row["text"]
    except KeyError:
        raise InputError(f'the data set {name} has no "text" column; its columns are {list(row)}') from None
    except (OSError, ValueError) as error:  # no network, no such data set, no such configuration
        raise InputError(
            f"cannot read the data set {name} from the Hugging Face hub: {error}. Check the name and the network, "
            "or build from local files or the demo corpus: --source FOLDER, --source demo"
        ) from None


def find_source(source):
    """Return (what the manifest says of the source, a function that yields its documents)."""
    path = Path(source)
    if source == "demo":
        return {
            "source": "demo",
            "revision": f"Python {sys.version.split()[0]}, NumPy {np.__version__}",
        }, demo_documents
    if path.exists():
        files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES) if path.is_dir() else [path]
        if not files or files[0].suffix not in TEXT_SUFFIXES:
            raise InputError(f"{source} holds no file that ends in {', '.join(sorted(TEXT_SUFFIXES))}")
        # sizes stand in for a revision: enough to notice that the folder has changed
        revision = hashlib.sha256(repr([(p.name, p.stat().st_size) for p in files]).encode()).hexdigest()
        return (
            {"source": str(path.resolve()), "revision": revision},
            lambda: itertools.chain.from_iterable(map(file_documents, files)),
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix not in TEXT_SUFFIXES:
        revision = FINEWEB_EDU_REVISION if source == FINEWEB_EDU else None
        return {"source": source, "revision": revision}, lambda: hub_documents(source, revision)
    raise InputError(f"no file or folder {source}; a Hugging Face data set is written owner/name, like {FINEWEB_EDU}")


# -----------------------------------------------------------------------------
# Documents to shards


def tokenize(texts):
    """Return (tokens of all texts as one uint16 array, number of documents, number of empty ones left out)."""
    encoder = get_tokenizer()
    parts, documents = [], 0
    for text in texts:
        if text:
            # no special tokens: a text that spells out <|endoftext|> is ordinary text. Lone surrogates become "?"
            text = text.encode("utf-8", "replace").decode("utf-8")
            parts += [[EOT], encoder.encode_to_numpy(text, disallowed_special=())]
            documents += 1
    tokens = np.concatenate(parts) if parts else np.empty(0)
    return tokens.astype("<u2"), documents, len(texts) - documents


def tokenize_in_parallel(documents, workers, start_method=None):
    """Yield the results of `tokenize` over chunks of documents, in order, so that no byte depends on the workers.

    Chunks of 256 documents, or fewer where they are long, keep the cost of the pool's pickling down.
    """

    def chunks():
        chunk, length = [], 0
        for text in documents:
            chunk.append(text)
            length += len(text or "")
            if len(chunk) == 256 or length > 1_000_000:
                yield chunk
                chunk, length = [], 0
        if chunk:
            yield chunk

    todo = chunks()
    with ProcessPoolExecutor(workers, multiprocessing.get_context(start_method)) as pool:
        pending = deque(pool.submit(tokenize, chunk) for chunk in itertools.islice(todo, 4 * workers))
        while pending:  # a bounded queue: memory does not grow with the source
            yield pending.popleft().result()
            pending.extend(pool.submit(tokenize, chunk) for chunk in itertools.islice(todo, 1))


def pack(arrays, shard_size):
    """Yield the concatenation of arrays in pieces of shard_size, the last one shorter. The buffer is reused."""
    buffer, filled = np.empty(shard_size, "<u2"), 0
    for array in arrays:
        while len(array):
            taken = min(len(array), shard_size - filled)
            buffer[filled : filled + taken] = array[:taken]
            filled, array = filled + taken, array[taken:]
            if filled == shard_size:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def build(source, out, shard_size=100_000_000, workers=None, start_method=None):
    """Tokenize source into shards in the folder out and return its manifest. A finished folder is left as it is.

    Raises InputError for a source that cannot be read and for a folder that holds something else.
    """
    from tqdm import tqdm

    out = Path(out)
    description, documents = find_source(source)
    wanted = {**description, "tokenizer": "gpt2", "shard_size": shard_size}
    manifest = read_manifest(out)
    if manifest and {key: manifest.get(key) for key in wanted} != wanted:
        found = {key: manifest.get(key) for key in wanted}
        raise InputError(f"{out} already holds shards of {found}, not of {wanted}: choose another --out or delete it")
    if manifest and manifest["complete"]:
        print(f"{out} is already complete: {manifest['tokens']:,} tokens in {len(manifest['shards'])} shards")
        return manifest
    if not manifest and out.is_dir() and any(SHARD_NAME.fullmatch(path.name) for path in out.iterdir()):
        raise InputError(f"{out} already holds shards of unknown origin: choose another --out or delete it")

    counts = {"documents": 0, "skipped_empty": 0, "tokens": 0}
    manifest = {**wanted, **counts, "shards": [], "complete": False}

    def write_manifest():
        with atomic_write(out / "manifest.json") as file:
            file.write(json.dumps(manifest, indent=1).encode() + b"\n")

    def counted(results):
        for tokens, documents, skipped in results:
            manifest["documents"] += documents
            manifest["skipped_empty"] += skipped
            manifest["tokens"] += len(tokens)
            bar.update(len(tokens))
            yield tokens

    name = "edufineweb" if source == FINEWEB_EDU else re.sub(r"[^A-Za-z0-9]+", "-", Path(source).stem).strip("-")
    with tqdm(desc=f"tokenizing {source}", unit=" tokens", unit_scale=True, mininterval=0.5) as bar:
        results = tokenize_in_parallel(documents(), workers or os.cpu_count(), start_method)
        for index, shard in enumerate(pack(counted(results), shard_size)):
            if index == 0 and len(shard) < shard_size:
                break  # the source ends within the validation shard
            split = "val" if index == 0 else "train"
            path = out / f"{name}_{split}_{index:06d}.npy"
            if index == 0:
                out.mkdir(parents=True, exist_ok=True)
                write_manifest()  # incomplete: whoever finds it knows that the build was interrupted
            with atomic_write(path) as file:
                np.save(file, shard)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            manifest["shards"].append({"file": path.name, "tokens": len(shard), "sha256": digest})
            bar.set_postfix_str(path.name)
    if len(manifest["shards"]) < 2:
        raise InputError(
            f"{source} has {manifest['tokens']:,} tokens, which leaves none for training after a validation shard of "
            f"{shard_size:,}: give more text or --shard_size {max(1, manifest['tokens'] // 10)}"
        )
    manifest["complete"] = True
    write_manifest()
    print(
        f"{out}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens in "
        f"{len(manifest['shards'])} shards; {manifest['skipped_empty']:,} empty documents left out"
    )
    return manifest


def main():
    parser = argparse.ArgumentParser(
        description="Tokenize text into uint16 shards for train_gpt2.py", allow_abbrev=False
    )
    parser.add_argument("--source", default=FINEWEB_EDU, help="a Hugging Face data set, local files, a folder, or demo")
    parser.add_argument("--out", default="edu_fineweb10B", help="folder of the shards (default: %(default)s)")
    parser.add_argument("--shard_size", type=int, help="tokens a shard (default: 100,000,000; 100,000 for demo)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    args = parser.parse_args()
    if args.workers < 1 or (args.shard_size is not None and args.shard_size < 1):
        parser.error("--workers and --shard_size must be 1 or more")
    shard_size = args.shard_size or (100_000 if args.source == "demo" else 100_000_000)
    front_door(build, args.source, args.out, shard_size, args.workers)


if __name__ == "__main__":
    main()
