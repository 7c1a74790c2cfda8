"""
The files of a Hugging Face data set, one after the other: listed at one commit, fetched, checked, deleted.

The next file downloads while the caller works on one: the disk holds two of them at most, unless they are kept.
"""

import errno
import hashlib
import os
import re
import shutil
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from lib.console import UserError, say
from lib.data.shards import split_of
from lib.files import hash_file

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"  # pinned: the hub's data sets change
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TRIES = 5
RETRY_DELAY = float(os.environ.get("HUB_RETRY_DELAY", 2))  # seconds before the second try; doubles with each one


def with_retries(what, attempt):
    """Return attempt(), tried again, with growing delays, while that can help. Raises UserError where it cannot."""
    for tries in range(1, TRIES + 1):
        try:
            return attempt()
        except Exception as error:  # from huggingface_hub, its HTTP client, Xet or the file system
            status = getattr(getattr(error, "response", None), "status_code", None) or 0
            reason = " ".join(str(error).split()) or repr(error)
            if isinstance(error, (TypeError, AttributeError)) or getattr(error, "errno", None) in DISK_FULL:
                raise  # not the network's doing
            if status in (401, 403, 404):
                raise UserError(
                    f"cannot read {what} from the Hugging Face hub: {reason} Check the name and the --revision; "
                    "a private or gated data set needs its terms accepted and the token of `hf auth login`"
                ) from None
            # other 4xx are final but for a timeout and too many requests; so is the client's own offline mode
            final = (400 <= status < 500 and status not in (408, 429)) or type(error).__name__ == "OfflineModeIsEnabled"
            if final or tries == TRIES:
                raise UserError(
                    f"cannot read {what} from the Hugging Face hub, tried {tries} times: {reason} Check the network "
                    "and start again, which goes on from here; without one, use local files or --source demo"
                ) from None
            say(f"{what}: {reason} Trying again", sys.stderr)
            time.sleep(RETRY_DELAY * 2 ** (tries - 1))


def choose_files(paths, name=None, split="train"):
    """Those of a data set's files that make up the split of the configuration `name`, in order.

    They are the .parquet files below a folder called `name`, or with its first "-" as a "/", as FineWeb has it:
    sample-10BT is sample/10BT/. Where their paths name splits (train-00000-of-00002.parquet, train/0000.parquet), only
    those with the word `split`; where none does, all are "train". Without .parquet files: the .bin token shards there.
    """
    if name:
        paths = [path for path in paths if f"/{name}/" in f"/{path}" or f"/{name.replace('-', '/', 1)}/" in f"/{path}"]
    tables = sorted(path for path in paths if path.endswith(".parquet"))
    if not tables:
        return sorted((p for p in paths if p.endswith(".bin") and split_of(Path(p).name)), key=lambda p: (p[-10:], p))

    def names(path, words):
        return re.search(rf"(?<![A-Za-z0-9])({words})(?![A-Za-z0-9])", path)

    if split != "train" or any(names(path, "train|test|validation|valid|val|dev") for path in tables):
        tables = [path for path in tables if names(path, re.escape(split))]
    return tables


def list_files(dataset, revision=None, name=None, split="train"):
    """Return (the commit that a branch, tag or commit stands for, [{"file", "size", "hash"}, ...])."""
    from huggingface_hub.hf_api import HfApi, RepoFile

    api = HfApi()
    commit = with_retries(dataset, lambda: api.dataset_info(dataset, revision=revision).sha)
    where = {"repo_id": dataset, "repo_type": "dataset", "revision": commit}
    tree = with_retries(dataset, lambda: list(api.list_repo_tree(**where, recursive=True)))
    files = {item.path: item for item in tree if isinstance(item, RepoFile)}
    chosen = [files[path] for path in choose_files(files, name, split)]
    if not chosen:
        folders = sorted({str(Path(path).parent) for path in files if path.endswith(".parquet")})
        raise UserError(
            f"{dataset} at {commit} has no .parquet files for --name {name} --split {split}, nor .bin token shards; "
            f"its folders with .parquet files: {', '.join(folders[:20]) or 'none'}"
        )
    # large files have a sha256; small ones only git's own hash, which check() knows by its length
    return commit, [{"file": f.path, "size": f.size, "hash": f.lfs.sha256 if f.lfs else f.blob_id} for f in chosen]


def check(path, file):
    """Raise OSError unless path holds what the hub says of the file."""
    size = path.stat().st_size
    if size != file["size"]:
        raise OSError(f"{size} bytes came, not {file['size']}.")
    digest = hashlib.sha256() if len(file["hash"]) == 64 else hashlib.sha1(b"blob %d\0" % size)
    if hash_file(path, digest) != file["hash"]:
        raise OSError(f"what came has the hash {digest.hexdigest()}, not {file['hash']}.")


def fetch(dataset, commit, file, folder):
    """Download one file into the folder, unless it is there already, and return its path once its hash is right."""
    from huggingface_hub import hf_hub_download, utils

    utils.disable_progress_bars()  # there is one bar, the caller's
    path = folder / file["file"]

    def attempt():
        try:
            hf_hub_download(dataset, file["file"], repo_type="dataset", revision=commit, local_dir=folder)
            check(path, file)
        except OSError:
            path.unlink(missing_ok=True)  # the client would take a wrong file that lies there for the right one
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

    for file in files[: 0 if keep else first]:  # left by a build that was killed
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
