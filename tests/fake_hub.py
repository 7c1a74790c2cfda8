"""
A stand-in for the Hugging Face hub on 127.0.0.1, for the real client: HF_ENDPOINT is its `endpoint`.

It serves repo info, the tree of a folder at a revision, what is at some paths, and files with ETag, X-Repo-Commit,
Content-Length and Range: one data set, and models. `mishaps` holds what goes wrong with the next requests of a file:
(path, kind), taken one a GET; `always` what goes wrong with all of them.
"""

import contextlib
import functools
import hashlib
import io
import json
import re
import shutil
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATASET = "someone/texts"


def length_of(content):
    return len(content) if isinstance(content, bytes) else content.stat().st_size


@functools.lru_cache
def sha256_of(content):
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Hub:
    def __init__(self, files, dataset, commit):
        self.files, self.dataset, self.commit = dict(files), dataset, commit  # path -> bytes, or Path of a large one
        self.pinned = commit
        self.models = {}  # name -> {path -> bytes}
        self.mishaps = []  # (path, kind), each once
        self.always = {}  # path -> kind
        self.headers = {}  # of answers that are errors
        self.requests = Counter()  # (method, path)

    def next_mishap(self, path):
        for mishap in self.mishaps:
            if mishap[0] == path:
                self.mishaps.remove(mishap)
                return mishap[1]
        return self.always.get(path)

    def entries(self):
        """What the hub says of each file and folder, by its path."""
        for path, content in self.files.items():
            size = length_of(content)
            git = "0" * 40
            if isinstance(content, bytes):
                git = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
            large = {"lfs": {"oid": sha256_of(content), "size": size, "pointerSize": 130}} if size > 1000 else {}
            yield {"type": "file", "path": path, "size": size, "oid": git, **large}
        for folder in {str(folder) for path in self.files for folder in PurePosixPath(path).parents} - {"."}:
            yield {"type": "directory", "path": folder, "oid": "0" * 40}

    def tree(self, folder, recursive):
        inside = [entry for entry in self.entries() if f"/{entry['path']}".startswith(f"{folder}/")]
        return [entry for entry in inside if recursive or "/" not in f"/{entry['path']}"[len(folder) + 1 :]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", headers=(), send=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if send is None else body[:send])
        if send is not None:  # cut the connection
            self.wfile.flush()
            self.close_connection = True

    def do_GET(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        if match := re.fullmatch(rf"/api/datasets/{hub.dataset}(/revision/(?P<revision>.+))?", path):
            hub.requests["info"] += 1
            if kind := hub.next_mishap("info"):
                return self.answer(int(kind), headers=hub.headers)
            if match["revision"] not in (None, "main", "v1", hub.commit, hub.pinned):
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            sha = hub.pinned if match["revision"] == hub.pinned else hub.commit
            return self.answer_json({"id": hub.dataset, "sha": sha, "siblings": []})
        at = f"/api/datasets/{hub.dataset}/%s/{hub.pinned}"
        if path.startswith(tree := at % "tree"):
            hub.requests["tree"] += 1
            if hub.next_mishap("tree"):
                return self.answer(500)
            found = hub.tree(path[len(tree) :], "recursive=true" in self.path.lower())
            if found:
                return self.answer_json(found)
        elif path == at % "paths-info":
            length = int(self.headers["Content-Length"])
            asked = parse_qs(self.rfile.read(length).decode()).get("paths", [])
            return self.answer_json([entry for entry in hub.entries() if entry["path"] in asked])
        prefix = f"/datasets/{hub.dataset}/resolve/{hub.pinned}/"
        if path.startswith(prefix):
            if (name := path[len(prefix) :]) in hub.files:
                return self.send_file(hub, name, hub.files[name])
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hub.pinned})
        for model, files in hub.models.items():
            if path.startswith(prefix := f"/{model}/resolve/main/") and (name := path[len(prefix) :]) in files:
                return self.send_file(hub, name, files[name])
        self.answer(404, b"", {"X-Error-Code": "EntryNotFound" if "/tree/" in path else "RepoNotFound"})

    def answer_json(self, body):
        self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    do_POST = do_GET
    do_HEAD = do_GET

    def send_file(self, hub, name, content):
        hub.requests[self.command, name] += 1
        headers = {"ETag": f'"{sha256_of(content)}"', "X-Repo-Commit": hub.pinned, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self.answer(200, b"", {**headers, "Content-Length": length_of(content)})
        kind = hub.next_mishap(name)
        if kind in ("429", "500"):
            return self.answer(int(kind), headers=hub.headers)
        if kind == "wrong":
            return self.answer(200, content[:-1] + bytes([content[-1] ^ 1]), headers)
        if kind == "short":  # the whole answer, of a file that lost its end
            return self.answer(200, content[: len(content) // 2], headers)
        start = 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{length_of(content) - 1}/{length_of(content)}"
        if isinstance(content, Path):
            self.answer(206 if start else 200, b"", {**headers, "Content-Length": length_of(content) - start})
            with open(content, "rb") as file:
                file.seek(start)
                return shutil.copyfileobj(file, self.wfile, 1 << 20)
        body = content[start:]
        self.answer(206 if start else 200, body, headers, send=len(body) // 2 if kind == "cut" else None)


@contextlib.contextmanager
def serving(files, dataset=DATASET, commit=COMMIT):
    hub = Hub(files, dataset, commit)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.hub = True, hub
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def pointed_at(endpoint, cache, monkeypatch):
    """Have the client, which is loaded already, use this endpoint and cache."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", cache / "modules")
