"""
What the scripts share: errors for the user, files that are never half-written, the tokenizer, the shard format.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import socket
import sys
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

EOT = 50256  # <|endoftext|>, the one special token of GPT-2
SHARD_NAME = re.compile(r"(?P<name>.+)_(?P<split>train|val)_(?P<index>\d{6})\.(npy|bin)")


class InputError(ValueError):
    """Something that the user can put right. The message says what was found, what was expected and what to do."""


def front_door(run, *args):
    """Call run(*args); an InputError becomes its message on stderr and exit code 2, without a traceback."""
    try:
        return run(*args)
    except InputError as error:
        rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        print(f"{rank}error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


@contextlib.contextmanager
def atomic_write(path):
    """Open path for writing bytes such that, whatever happens, it holds its old content or all of the new one."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the rename itself is durable only once the folder is
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_folder(folder):
    """Make the folder and hold it for this process, by a lock of the operating system that goes when the process does.

    Raises InputError, with the holder's process id and host, where another holds it. Clears stale temporary files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise InputError(f"{folder}/ is being written by {file.read()}: wait, or stop it with kill") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        for stale in folder.glob("*.tmp"):
            stale.unlink()
        yield


def hash_file(path, digest=None):
    """The hash of a file in hexadecimal, sha256 unless told, read in pieces: shards and downloads are large."""
    digest = digest or hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@functools.cache
def get_tokenizer():
    """The GPT-2 BPE as a tiktoken.Encoding, from assets/: tiktoken's own is a download, and clusters are offline."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=load_tiktoken_bpe(
            str(Path(__file__).parent.parent / "assets" / "gpt2.tiktoken"),
            expected_hash="306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        ),
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=50257,
    )


def read_manifest(folder):
    """The manifest of a folder of shards, or None where it has none (shards made by other tools)."""
    path = Path(folder) / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else None


def find_shards(data_root, split):
    """The paths of a split's shards in name order. Raises InputError where there are none."""
    root = Path(data_root)
    paths = sorted(root.iterdir()) if root.is_dir() else []
    paths = [path for path in paths if (m := SHARD_NAME.fullmatch(path.name)) and m["split"] == split]
    if not paths:
        raise InputError(
            f"no *_{split}_*.npy shards in {data_root}/: run python fineweb.py --out {data_root} (28 GB download), "
            "or try python train_gpt2.py --preset demo"
        )
    manifest = read_manifest(root)
    if manifest and not manifest["complete"]:
        raise InputError(f"{data_root}/ is unfinished: start fineweb.py again with the flags that it was started with")
    if manifest:
        listed = {s["file"] for s in manifest["shards"] if SHARD_NAME.fullmatch(s["file"])["split"] == split}
        for name in sorted(listed ^ {path.name for path in paths}):
            raise InputError(f"{root}/{name} is in the folder or in its manifest.json, not in both: build it again")
    return paths


def open_shard(path):
    """Memory-map a shard: a .npy of one-dimensional uint16, or llm.c's .bin (a header of 256 int32, then uint16)."""
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            header = np.fromfile(path, "<i4", 256)
            tokens = np.memmap(path, "<u2", mode="r", offset=1024)
            if len(header) < 3 or tuple(header[:3]) != (20240520, 1, len(tokens)):
                raise ValueError(f"its header {header[:3]} should be 20240520, 1 and its {len(tokens)} tokens")
        if tokens.dtype != np.uint16 or tokens.ndim != 1 or len(tokens) == 0:
            raise ValueError(f"it has dtype {tokens.dtype} and shape {tokens.shape}, not uint16 in one dimension")
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path} is not a whole token shard: {error}. Fetch it again or build it again") from None
    return tokens
