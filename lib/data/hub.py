"""
The files of a Hugging Face data set, one after the other: listed at one commit, fetched, verified, deleted.

The next file downloads while the caller works on one: the disk holds at most two of them.
"""

import hashlib
import re
import shutil
import sys
import time
from collections import deque
from multiprocessing.pool import ThreadPool
from pathlib import Path

from lib.console import UserError, say
from lib.data.readers import FORMATS, format_of
from lib.files import hash_file

PAUSES = (2, 4, 8, 16)  # seconds between tries, unless the hub asks for others
LONGEST_PAUSE = 600  # seconds; the build ends if the hub asks for more


def with_retries(what, attempt):
    """Return attempt(), retried after what is transient: no connection, a timeout, damage, an answer of 408, 429 or
    5xx. Raises UserError with the words of the last error, or of the first that is not transient."""
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, XetDownloadError

    for tries, pause in enumerate((*PAUSES, None), start=1):
        try:
            return attempt()
        except (HTTPError, XetDownloadError, OSError, ValueError, RuntimeError) as caught:
            error = isinstance(caught, LocalEntryNotFoundError) and caught.__cause__ or caught  # it only guesses
        response, asked = getattr(error, "response", None), 0
        if response is not None:
            transient = response.status_code in (408, 429) or response.status_code >= 500
            retry, rate = (response.headers.get(name, "") for name in ("Retry-After", "RateLimit"))
            found = re.match(r"(\d+)", retry) or re.search(r"\bt=(\d+)", rate)
            asked = int(found[1]) if found else 0  # seconds
        else:  # errors of the file system have a number; ValueError and RuntimeError: `datasets` refuses a name
            lasting = isinstance(error, (FileNotFoundError, OfflineModeIsEnabled, ValueError, RuntimeError))
            network = isinstance(error, (ConnectionError, TimeoutError)) or not getattr(error, "errno", None)
            transient = network and not lasting
        failure = f"{what}: {type(error).__name__}: {' '.join(str(error).split())}"
        if not transient:
            raise UserError(failure) from error
        if pause is None or asked > LONGEST_PAUSE:
            then = f" in {asked} s, as the hub asks," if asked else ""
            raise UserError(f"{failure} (tried {tries} times). Start again{then} to resume from here") from error
        say(f"{failure}: " + (f"waiting {asked} s, as the hub asks" if asked else f"retrying in {pause} s"), sys.stderr)
        time.sleep(asked or pause)


def list_files(dataset, revision=None, name=None, split="train"):
    """Return (the commit that a branch, tag or commit stands for, [{"file", "size", "hash"}, ...] of a split as
    `datasets` resolves it), without downloading them. `name` is a configuration, or else a folder."""
    import datasets
    from huggingface_hub.hf_api import HfApi, RepoFile

    def look_up():
        commit = HfApi().dataset_info(dataset, revision=revision).sha
        tree = HfApi().list_repo_tree(dataset, repo_type="dataset", revision=commit, recursive=True)
        files = {item.path: item for item in tree if isinstance(item, RepoFile)}
        try:
            config = datasets.load_dataset_builder(dataset, name, revision=commit).config
        except ValueError:
            if not any(path.startswith(f"{name}/") for path in files):
                raise
            config = datasets.load_dataset_builder(dataset, data_dir=name, revision=commit).config
        if config.data_files is None:
            raise ConnectionError("its files could not be listed, only an old copy in the cache was found")
        return commit, files, config

    commit, files, config = with_retries(dataset, look_up)
    if split not in config.data_files:
        raise UserError(f"{dataset} has no --split {split}: choose one of {', '.join(map(str, config.data_files))}")
    paths = [str(url).removeprefix(f"hf://datasets/{dataset}@{commit}/") for url in config.data_files[split]]
    for path in paths:
        if path not in files or not format_of(path):
            raise UserError(f"{dataset} has {path}, which cannot be read: supported are {FORMATS}; give another --name")
    files = [files[path] for path in paths]
    size = sum(file.size for file in files)
    say(f"{dataset} at {commit}: {config.name}, split {split}, {size:,} bytes (files: {len(files):,})")
    # large files have a sha256, small ones only git's own hash; fetch() distinguishes them by length
    return commit, [{"file": f.path, "size": f.size, "hash": f.lfs.sha256 if f.lfs else f.blob_id} for f in files]


def fetch(dataset, commit, file, folder):
    """Download one file into the folder, unless it is there already, verify its hash, and return its path."""
    from huggingface_hub import hf_hub_download

    def attempt():
        path = Path(hf_hub_download(dataset, file["file"], repo_type="dataset", revision=commit, local_dir=folder))
        git = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        if (found := hash_file(path, "sha256" if len(file["hash"]) == 64 else lambda: git)) != file["hash"]:
            path.unlink()  # the client would accept it the next time
            raise ConnectionError(f"the received file has the hash {found}, not {file['hash']}")
        return path

    return with_retries(f"{dataset}/{file['file']}", attempt)


def fetch_in_turn(dataset, commit, files, folder, first=0):
    """Yield (index, path) of the files from `first` on. Each is deleted when the next one is asked for."""
    coming = deque()
    with ThreadPool(1) as background:  # a daemon: Ctrl-C does not wait for 2 GB
        for index in range(first, len(files)):
            for file in files[index + len(coming) : index + 2]:  # this one and the next
                coming.append(background.apply_async(fetch, (dataset, commit, file, folder)))
            path = coming.popleft().get()
            yield index, path
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
