"""
What the scripts share: errors for the user, files that are never half-written, the tokenizer.
"""

import contextlib
import functools
import hashlib
import os
import socket
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

EOT = 50256  # <|endoftext|>, the one special token of GPT-2


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
