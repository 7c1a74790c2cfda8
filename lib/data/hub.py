"""
The files of a Hugging Face data set, one after the other: listed at one commit, fetched, verified, deleted.

The next file downloads while the caller works on one: the disk holds at most two of them, unless they are kept.
"""

import errno
import hashlib
import os
import shutil
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from lib.console import UserError, say
from lib.data.readers import FORMATS, format_of
from lib.data.shards import split_of
from lib.files import hash_file

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TRIES = 5
RETRY_DELAY = float(os.environ.get("HUB_RETRY_DELAY", 2))  # seconds before the second try; doubles with each one


def with_retries(what, attempt):
    """Return attempt(), retried with growing delays. Raises UserError for permanent errors, and after the last try."""
    for tries in range(1, TRIES + 1):
        try:
            return attempt()
        except UserError:
            raise
        except Exception as error:  # from huggingface_hub, its HTTP client, Xet or the file system
            status = getattr(getattr(error, "response", None), "status_code", None) or 0
            reason = " ".join(str(error).split()) or repr(error)
            if isinstance(error, (TypeError, AttributeError)) or getattr(error, "errno", None) in DISK_FULL:
                raise  # not a network error
            if status in (401, 403, 404):
                raise UserError(
                    f"cannot read {what} from the Hugging Face hub: {reason} Check the name and the --revision; "
                    "a private or gated data set requires accepting its terms and logging in with `hf auth login`"
                ) from None
            # permanent: other 4xx but timeouts and too many requests, and the client's own offline mode
            final = (400 <= status < 500 and status not in (408, 429)) or type(error).__name__ == "OfflineModeIsEnabled"
            if final or tries == TRIES:
                raise UserError(
                    f"cannot read {what} from the Hugging Face hub, tried {tries} times: {reason} Check the network "
                    "and start again to resume from here; without one, use local files or --source demo"
                ) from None
            say(f"{what}: {reason} Trying again", sys.stderr)
            time.sleep(RETRY_DELAY * 2 ** (tries - 1))


def choose_shards(paths, name=None):
    """The token shards among a data set's files, below a folder called `name` if one is given, in order; none if there
    are tables of text, too."""
    paths = [path for path in paths if not name or f"/{name}/" in f"/{path}"]
    shards = [path for path in paths if path.endswith(".bin") and split_of(Path(path).name)]
    return [] if any(path.endswith(".parquet") for path in paths) else sorted(shards, key=lambda p: (p[-10:], p))


def resolve(dataset, commit, name, split, paths):
    """Resolve a configuration and a split of a data set as `datasets` does: (their names in words, their files).

    `name` is a configuration, or else a folder. Downloads no data. Raises UserError if there are none.
    """
    import datasets
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it warns of a data set without a card
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()

    def load(**which):
        try:
            builder = datasets.load_dataset_builder(dataset, revision=commit, **which)
        except LocalEntryNotFoundError:  # a network error, though a FileNotFoundError
            raise
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            if getattr(error, "response", None) is not None:
                raise
            if "data_dir" not in which and any(path.startswith(f"{name}/") for path in paths):
                return load(data_dir=name)
            reason = " ".join(str(error).split("Example of usage")[0].split())
            folders = sorted({str(Path(path).parent) for path in paths if format_of(path)})
            raise UserError(
                f"{dataset} at {commit} has no files for --name {name} --split {split}: {reason} Give one of its "
                f"configurations or folders as --name; folders with files of text: {', '.join(folders[:20]) or 'none'}"
            ) from None
        if builder.config.data_files is None:
            raise OSError("its files could not be listed, only an old copy in the cache was found.")
        what = f"folder {name}" if "data_dir" in which else f"configuration {builder.config.name}"
        return what, builder.config.data_files

    what, splits = with_retries(dataset, lambda: load(name=name))
    if split not in splits:
        raise UserError(f"{dataset}, {what}, has no --split {split}: choose one of {', '.join(map(str, splits))}")
    begin = f"hf://datasets/{dataset}@{commit}/"
    return what, [url.removeprefix(begin) for url in map(str, splits[split])]


def list_files(dataset, revision=None, name=None, split="train"):
    """Return (the commit that a branch, tag or commit stands for, [{"file", "size", "hash"}, ...])."""
    from huggingface_hub.hf_api import HfApi, RepoFile

    api = HfApi()
    commit = with_retries(dataset, lambda: api.dataset_info(dataset, revision=revision).sha)
    where = {"repo_id": dataset, "repo_type": "dataset", "revision": commit}
    tree = with_retries(dataset, lambda: list(api.list_repo_tree(**where, recursive=True)))
    files = {item.path: item for item in tree if isinstance(item, RepoFile)}
    what, chosen = "token shards", choose_shards(files, name)
    if not chosen:
        what, chosen = resolve(dataset, commit, name, split, files)
        what += f", split {split}"
        for path in chosen:
            if path not in files or not format_of(path):
                raise UserError(
                    f"{dataset}, {what}, holds {path}, which cannot be read: supported are {FORMATS}. Choose another "
                    "--name, or fetch it with hf download, convert it, and give the folder as --source"
                )
    size = sum(files[path].size for path in chosen)
    say(f"{dataset} at {commit}: {what}, {len(chosen):,} files, {size:,} bytes")
    # large files have a sha256, small ones only git's own hash; check() tells them by their length
    files = [files[path] for path in chosen]
    return commit, [{"file": f.path, "size": f.size, "hash": f.lfs.sha256 if f.lfs else f.blob_id} for f in files]


def check(path, file):
    """Raise OSError unless path has the size and hash that the hub states for the file."""
    size = path.stat().st_size
    if size != file["size"]:
        raise OSError(f"{size} bytes were received, not {file['size']}.")
    digest = hashlib.sha256() if len(file["hash"]) == 64 else hashlib.sha1(b"blob %d\0" % size)
    if hash_file(path, digest) != file["hash"]:
        raise OSError(f"the received file has the hash {digest.hexdigest()}, not {file['hash']}.")


def fetch(dataset, commit, file, folder):
    """Download one file into the folder, unless it is there already, verify its hash, and return its path."""
    from huggingface_hub import hf_hub_download, utils

    utils.disable_progress_bars()  # the caller has its own
    path = folder / file["file"]

    def attempt():
        try:
            hf_hub_download(dataset, file["file"], repo_type="dataset", revision=commit, local_dir=folder)
            check(path, file)
        except OSError:
            path.unlink(missing_ok=True)  # the client would accept a wrong file that is there
            raise
        return path

    return with_retries(f"{dataset}/{file['file']}", attempt)


def fetch_in_turn(dataset, commit, files, folder, first=0, keep=False):
    """Yield (index, path) of the files from `first` on. Each is deleted when the next one is asked for, or kept."""

    def start(index, future):
        def run():
            try:
                future.set_result(fetch(dataset, commit, files[index], folder))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()  # a daemon: Ctrl-C does not wait for 2 GB
        return future

    for file in files[: 0 if keep else first]:  # left by a killed build
        (folder / file["file"]).unlink(missing_ok=True)
    for stale in folder.rglob("*.incomplete"):
        stale.unlink()
    coming = start(first, Future()) if first < len(files) else None
    for index in range(first, len(files)):
        path = coming.result()
        if index + 1 < len(files):
            coming = start(index + 1, Future())
        yield index, path
        if not keep:
            path.unlink(missing_ok=True)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
