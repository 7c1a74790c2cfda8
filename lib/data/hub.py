"""
The files of a Hugging Face data set, one after the other: listed at one commit, fetched, verified, deleted.

The next file downloads while the caller works on one: the disk holds at most two of them, unless they are kept.
"""

import hashlib
import re
import shutil
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from lib.console import UserError, say
from lib.data.readers import FORMATS, count_files, format_of
from lib.data.shards import split_of
from lib.files import hash_file

PAUSES = (2, 4, 8, 16)  # seconds between tries, unless the hub asks for others
LONGEST_PAUSE = 600  # seconds; the build ends if the hub asks for more


class Damaged(Exception):
    """What was received is not what the hub has."""


def seconds_asked(headers):
    """How long the hub asks to wait, by the headers of its answer; 0 if it does not say."""
    found = re.match(r"(\d+)", headers.get("Retry-After", "")) or re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    return int(found[1]) if found else 0


def with_retries(what, attempt):
    """Return attempt(), retried after what is transient: no connection, a timeout, damage, an answer of 408, 429 or
    5xx. Raises UserError after the last try, and at once for other answers and for errors of the file system."""
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, XetDownloadError

    network = (HTTPError, XetDownloadError, LocalEntryNotFoundError, ConnectionError, TimeoutError, Damaged)
    for tries, pause in enumerate((*PAUSES, None), start=1):
        try:
            return attempt()
        except (*network, OSError) as error:
            if not isinstance(error, network) and error.errno:  # an unwritable cache, a full disk
                raise UserError(f"cannot fetch {what}: {error}") from error
            if isinstance(error, LocalEntryNotFoundError) and error.__cause__:  # the client only guesses at its cause
                error = error.__cause__  # noqa: PLW2901
            status, asked = 0, 0
            if (response := getattr(error, "response", None)) is not None:
                status, asked = response.status_code, seconds_asked(response.headers)
            failure = f"{what}: {type(error).__name__}: {' '.join(str(error).split())}"
            final = 400 <= status < 500 and status not in (408, 429) or isinstance(error, OfflineModeIsEnabled)
        if status in (401, 403, 404):
            raise UserError(
                f"{failure}. Check the name and the --revision; a private or gated data set requires accepting its "
                "terms and logging in with `hf auth login`"
            )
        if final or pause is None or asked > LONGEST_PAUSE:
            then = f"in {asked} s, as the hub asks," if asked else "again"
            raise UserError(
                f"{failure} (tried {tries} times). Start {then} to resume from here; without a network, use local "
                "files or --source demo"
            )
        say(f"{failure}: " + (f"waiting {asked} s, as the hub asks" if asked else f"retrying in {pause} s"), sys.stderr)
        time.sleep(asked or pause)


def choose_shards(paths, name=None):
    """The token shards among a data set's files, below a folder called `name` if one is given, in order; none if there
    are tables of text, too. Raises UserError unless they fit into one folder and have both splits."""
    paths = [path for path in paths if not name or f"/{name}/" in f"/{path}"]
    shards = [path for path in paths if path.endswith(".bin") and split_of(Path(path).name)]
    if not shards or any(path.endswith(".parquet") for path in paths):
        return []
    for split in ("train", "val"):
        if not any(split_of(Path(path).name) == split for path in shards):
            raise UserError(f"no *_{split}_*.bin among {', '.join(shards[:5])}: choose a data set that has both splits")
    of_name = {}
    for path in shards:
        if (other := of_name.setdefault(Path(path).name, path)) != path:
            raise UserError(f"{other} and {path} have the same name: choose the folder of one of them with --name")
    return sorted(shards, key=lambda path: (path[-10:], path))


def resolve(dataset, commit, name, split, paths):
    """Resolve a configuration and a split of a data set as `datasets` does: (their names in words, their files).

    `name` is a configuration, or else a folder. Downloads no data. Raises UserError if there are no such files.
    """
    import datasets
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.get_logger("huggingface_hub.repocard").setLevel(logging.ERROR)  # it warns of a data set without a card
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()

    def load(**which):
        try:
            builder = datasets.load_dataset_builder(dataset, revision=commit, **which)
        except (HTTPError, LocalEntryNotFoundError):  # among them are FileNotFoundErrors
            raise
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            if "data_dir" not in which and any(path.startswith(f"{name}/") for path in paths):
                return load(data_dir=name)
            reason = " ".join(str(error).split("Example of usage")[0].split())
            folders = sorted({str(Path(path).parent) for path in paths if format_of(path)})
            raise UserError(
                f"cannot open {dataset} at {commit} with --name {name} --split {split}: {reason} If the name is wrong, "
                f"give a configuration or one of the folders with files of text: {', '.join(folders[:20]) or 'none'}"
            ) from error
        if builder.config.data_files is None:
            raise ConnectionError("its files could not be listed, only an old copy in the cache was found")
        what = f"folder {name}" if "data_dir" in which else f"configuration {builder.config.name}"
        return what, builder.config.data_files

    what, splits = with_retries(dataset, lambda: load(name=name))
    if split not in splits:
        raise UserError(f"{dataset}, {what}, has no --split {split}: choose one of {', '.join(map(str, splits))}")
    begin = f"hf://datasets/{dataset}@{commit}/"
    return f"{what}, split {split}", [url.removeprefix(begin) for url in map(str, splits[split])]


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
        for path in chosen:
            if path not in files or not format_of(path):
                raise UserError(
                    f"{dataset}, {what}, holds {path}, which cannot be read: supported are {FORMATS}. Choose another "
                    "--name, or fetch it with hf download, convert it, and give the folder as --source"
                )
    size = sum(files[path].size for path in chosen)
    say(f"{dataset} at {commit}: {what}, {count_files(chosen)}, {size:,} bytes")
    files = [files[path] for path in chosen]
    # large files have a sha256, small ones only git's own hash; check() distinguishes them by length
    return commit, [{"file": f.path, "size": f.size, "hash": f.lfs.sha256 if f.lfs else f.blob_id} for f in files]


def check(path, file):
    """Raise Damaged unless path has the size and hash that the hub states for the file."""
    size = path.stat().st_size
    if size != file["size"]:
        raise Damaged(f"{size} bytes were received, not {file['size']}")
    digest = hashlib.sha256() if len(file["hash"]) == 64 else hashlib.sha1(b"blob %d\0" % size)
    if hash_file(path, digest) != file["hash"]:
        raise Damaged(f"the received file has the hash {digest.hexdigest()}, not {file['hash']}")


def fetch(dataset, commit, file, folder):
    """Download one file into the folder, unless it is there already, verify its hash, and return its path."""
    from huggingface_hub import hf_hub_download, utils

    utils.disable_progress_bars()  # the caller reports the progress
    path = folder / file["file"]

    def attempt():
        try:
            hf_hub_download(dataset, file["file"], repo_type="dataset", revision=commit, local_dir=folder)
            check(path, file)
        except (OSError, Damaged):
            path.unlink(missing_ok=True)  # the client would accept a wrong file that is there
            raise
        return path

    return with_retries(f"{dataset}/{file['file']}", attempt)


def fetch_in_turn(dataset, commit, files, folder, first=0, keep=False):
    """Yield (index, path) of the files from `first` on. Each is deleted when the next one is asked for, or kept."""

    def start(index):
        future = Future()

        def run():
            try:
                future.set_result(fetch(dataset, commit, files[index], folder))
            except BaseException as error:  # raised where the result is awaited
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()  # a daemon: Ctrl-C does not wait for 2 GB
        return future

    for file in files[: 0 if keep else first]:  # left by a killed build
        (folder / file["file"]).unlink(missing_ok=True)
    coming = start(first) if first < len(files) else None
    for index in range(first, len(files)):
        path = coming.result()
        if index + 1 < len(files):
            coming = start(index + 1)
        yield index, path
        if not keep:
            path.unlink(missing_ok=True)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
