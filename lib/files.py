"""Paths, atomic writes, folders locked by one process, and hashes."""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import secrets
import socket
from pathlib import Path

from lib.console import UserError, say

ROOT = Path(__file__).parent.parent  # the repository
OUR_TEMPORARY = re.compile(r".+\.[0-9a-f]{16}\.tmp")  # as atomic_write names them
say_once = functools.cache(say)


def expand(path):
    """A path as a str, with a leading ~ expanded, also of --flag=~/x. Raises UserError for an unknown user or a URL."""
    expanded = os.path.expanduser(os.fspath(path))
    if expanded.startswith("~"):
        raise UserError(f"{path} begins with ~, and there is no such user: write ./{path} for a file of that name")
    if re.match(r"\w+://", expanded):
        raise UserError(f"{path} is a URL, not a path on this machine: download it, or mount it as a folder")
    return expanded


def why_missing(path):
    """The system's reason why a path cannot be accessed; "" if it exists."""
    try:
        os.stat(path)
    except OSError as error:
        return error.strerror
    return ""


def list_folder(folder):
    """The paths in a folder; none if it does not exist. Raises UserError if it cannot be listed."""
    try:
        return list(Path(folder).iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {folder}/: {error.strerror}. Fix that, or choose another folder") from None


@contextlib.contextmanager
def atomic_write(path):
    """Open path for writing bytes; whatever happens, it holds either its old content or all of the new."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)  # makes the rename durable
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_folder(folder):
    """Sync a folder, so that the names of its files survive a power cut. Many network and shared folders do not support
    that: they are used anyway, with a warning."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        say_once(f"warning: {folder}/ cannot be synced ({error.strerror}): after a power cut it may lack new files")


@contextlib.contextmanager
def lock_folder(folder, purpose="", wait=False):
    """Create the folder, lock it until this process ends at the latest, and delete our own stale temporary files there.
    Yields the note that the previous holder left; this one leaves its process id, host and `purpose`. If another
    process holds the lock, waits for it, or raises UserError with its note."""
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / "lock", "a+b", buffering=0))  # others read the note
            file.seek(0)
            before = file.read().decode(errors="replace")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise UserError(f"{folder}/ is being written by {before}: wait, or stop it with kill") from None
                say(f"{folder}/ is being written by {before}: waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:  # some network file systems have no locks
                say(f"warning: {folder}/ cannot be locked ({error}): make sure that nothing else writes to it")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}{purpose}".encode())
            for path in folder.iterdir():
                if OUR_TEMPORARY.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise UserError(f"cannot write {folder}/: {error}. Fix that, or choose another folder") from None
        yield before


def hash_file(path, digest="sha256"):
    """The hash of a file in hexadecimal; digest: its name, or a function that returns a hashlib object."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, digest).hexdigest()
