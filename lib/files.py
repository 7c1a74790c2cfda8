"""
Files that are complete or not there, folders that one process writes, and hashes.
"""

import contextlib
import errno
import functools
import hashlib
import os
import re
import socket
from pathlib import Path

from lib.console import UserError, say

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

CANNOT_SYNC = {  # the answers of folders that cannot be synced, or opened for it; a failing disk gives others
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EPERM, errno.EACCES,
}  # fmt: skip
ROOT = Path(__file__).parent.parent  # of this code
OUR_TEMPORARY = re.compile(
    r"(model_\d{5,}\.pt|log\.txt|curve\.png|manifest\.json|[\w.-]+_(train|val)(_\d{6}\.(npy|bin)|\.bin))\.\d+\.tmp"
)


def expand(path):
    """A path that may begin with ~, the home folder, which neither Python nor a shell after "=" expands, as a str.
    Raises UserError where that is the home of a user that there is not."""
    expanded = os.path.expanduser(os.fspath(path))
    if expanded.startswith("~"):
        raise UserError(f"{path} begins with ~, and there is no such user: write ./{path} for a file of that name")
    return expanded


def why_missing(path):
    """What the system says of a path that it cannot look up, "" for one that is there."""
    try:
        os.stat(path)
    except OSError as error:
        return error.strerror
    except ValueError as error:  # a zero byte in it
        return str(error)
    return ""


def list_folder(folder):
    """The paths in a folder, none where there is no folder. Raises UserError where the system refuses to list it."""
    try:
        return list(Path(folder).iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {folder}/: {error.strerror}. Fix that, or choose another folder") from None


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
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_folder(folder):
    """Have the disk hold the names of the files in a folder. Many network and shared folders cannot do that on request:
    they are used all the same, with a warning."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
        warn_of_unsynced(folder, error.strerror)


@functools.cache  # once a folder
def warn_of_unsynced(folder, reason):
    say(f"warning: {folder}/ cannot be synced ({reason}): after a power cut it may lack the newest files")


@contextlib.contextmanager
def lock_folder(folder, purpose=""):
    """Make the folder and hold it for this process, by a lock of the operating system that goes when the process does.
    Yields what the holder before noted in it; this one notes its process id, host and `purpose`.

    Raises UserError, with that note, where another process holds it. Clears our own stale temporary files.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / "lock", "a+b", buffering=0))  # others can read it at once
            file.seek(0)
            before = file.read().decode(errors="replace")
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder}/ is being written by {before}: wait, or stop it with kill") from None
            except OSError as error:  # some network file systems have no locks
                say(f"warning: {folder}/ cannot be locked ({error}): see to it that nothing else writes it")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}{purpose}".encode())
            for path in folder.iterdir():
                if OUR_TEMPORARY.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise UserError(f"cannot write {folder}/: {error}. Fix that, or choose another folder") from None
        yield before


def hash_file(path, digest=None):
    """The hash of a file in hexadecimal, sha256 unless told, read in pieces: shards and downloads are large."""
    digest = digest or hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sample_hash(path):
    """The hash of a file's size and of four pieces of 16 kB, evenly spread: another content is noticed at no cost."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            for i in range(4):
                file.seek(max(0, size - (16 << 10)) * i // 3)
                digest.update(file.read(16 << 10))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. Fix its permissions, or delete it") from None
    return digest.hexdigest()
