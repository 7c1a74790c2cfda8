"""
FineWeb-Edu sample-10BT at its full size, without a network: what building it takes, and going on after a kill.

    python tests/full_scale.py                # 13 files of 2.15 GB and one of 0.54, 27 GB of disk, half an hour
    python tests/full_scale.py --scale 0.02   # the same in small

A stand-in for the Hugging Face hub serves files of the real names, sizes and compression, whose documents of some 1,500
tokens are made of docstrings; `python fineweb.py` fetches and tokenizes them. When 95 of 100 shards are there it is
killed with SIGKILL, and started again. Every half second its memory and its folder are looked at.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from fake_hub import serving

from lib.data.demo import demo_documents
from lib.data.shards import FINEWEB_EDU
from lib.data.sources import FINEWEB_EDU_REVISION
from lib.tokenizer import get_tokenizer

ROOT = Path(__file__).resolve().parent.parent
FILE, LAST, GROUP = 2.15e9, 0.54e9, 1000  # bytes, bytes, documents
TOKENS_PER_BYTE = 0.35  # of the real files


def write_table(path, size):
    """A .parquet of so many bytes: documents in groups of 1,000, and a column that pads each group to the real ratio of
    tokens to bytes."""
    choose, texts, ratio = random.Random(0), demo_documents(), 0.5  # bytes of a character, once compressed
    lengths = [len(ids) for ids in get_tokenizer().encode_batch(texts, disallowed_special=())]
    schema = pa.schema([("text", pa.string()), ("id", pa.binary())])
    with open(path, "wb") as file, pq.ParquetWriter(file, schema, compression="snappy") as writer:
        while file.tell() < size:
            documents, tokens, before = [], 0, file.tell()
            for _ in range(GROUP):
                parts, wanted = [], choose.lognormvariate(6.6, 0.8)  # tokens; the last part exceeds them
                while wanted > 0:
                    i = choose.randrange(len(texts))
                    parts.append(texts[i])
                    wanted -= lengths[i]
                    tokens += lengths[i]
                documents.append("\n\n".join(parts))
            pad = max(0, tokens / TOKENS_PER_BYTE - ratio * sum(map(len, documents)))
            padding = [os.urandom(int(pad / GROUP)) for _ in documents]
            writer.write_table(pa.table([documents, padding], schema), row_group_size=GROUP)
            text = file.tell() - before - int(pad / GROUP) * GROUP
            ratio = text / sum(map(len, documents))


def bytes_in(folder):
    """Of (shards, downloads), as they lie on the disk."""
    sizes = [0, 0]
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # just removed
            sizes[".fineweb_download" in path.parts] += path.stat().st_blocks * 512
    return sizes


class Watch:
    """A build, with what it has taken: seconds, CPU seconds and memory of the parent and its workers, disk."""

    def __init__(self, out, endpoint, flags):
        self.out, self.peak, self.cpu = out, {"parent": 0, "worker": 0, "disk": 0, "downloads": 0}, {}
        env = {**os.environ, "HF_ENDPOINT": endpoint, "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, str(ROOT / "fineweb.py"), "--out", str(out), *flags]
        self.start = time.time()
        with open(out.with_suffix(".log"), "ab") as log:
            self.process = psutil.Popen(command, env=env, stdout=log, stderr=log, cwd=out.parent)

    def shards(self):
        """Names and times of the shards that are there."""
        return sorted((path.stat().st_mtime, path.name) for path in self.out.glob("*.npy"))

    def look(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            people = [("parent", self.process), *(("worker", child) for child in self.process.children())]
            for who, process in people:
                self.peak[who] = max(self.peak[who], process.memory_info().rss)
                times = process.cpu_times()
                self.cpu[who, process.pid] = times.user + times.system
        shards, downloads = bytes_in(self.out)
        self.peak["downloads"] = max(self.peak["downloads"], downloads)
        self.peak["disk"] = max(self.peak["disk"], shards + downloads)

    def until(self, happened):
        """Seconds from the start until happened(), or until the end."""
        while not happened() and self.process.poll() is None:
            self.look()
            time.sleep(0.5)
        return time.time() - self.start

    def report(self, name):
        cpu = {who: sum(s for (kind, _), s in self.cpu.items() if kind == who) for who in ("parent", "worker")}
        memory = {f"{key} GB": round(value / 1e9, 2) for key, value in self.peak.items()}
        print(f"{name}: exit {self.process.returncode}, CPU seconds {cpu}, peaks {memory}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of the files and shards (default: %(default)s)")
    parser.add_argument("--workers", default=str(os.cpu_count()), help="processes (default: %(default)s)")
    parser.add_argument("--dir", help="where the files and shards come to lie (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        big, small, out = Path(folder, "big.parquet"), Path(folder, "small.parquet"), Path(folder, "edu_fineweb10B")
        start = time.time()
        write_table(big, FILE * args.scale)
        write_table(small, LAST * args.scale)
        sizes = f"{big.stat().st_size / 1e9:.2f} and {small.stat().st_size / 1e9:.2f} GB"
        print(f"files of {sizes} in {time.time() - start:.0f} s", flush=True)
        files = {f"sample/10BT/{i:03d}_00000.parquet": big if i < 13 else small for i in range(14)}
        flags = ["--workers", args.workers, "--shard_size", str(int(1e8 * args.scale))]
        card = "---\nconfigs:\n- config_name: sample-10BT\n  data_files: sample/10BT/*\n---\n"
        with serving({**files, "README.md": card.encode()}, FINEWEB_EDU, FINEWEB_EDU_REVISION) as hub:
            first = Watch(out, hub.endpoint, flags)
            print(f"first file there after {first.until(lambda: any(out.rglob('*.parquet'))):.1f} s", flush=True)
            print(f"first shard after {first.until(first.shards):.1f} s", flush=True)
            seconds = first.until(lambda: len(first.shards()) >= 95)
            times = [at for at, _ in first.shards()]
            between = sorted(b - a for a, b in zip(times, times[1:], strict=False))
            middle, most = between[len(between) // 2], between[-1]
            print(
                f"95 shards after {seconds:.0f} s; from one to the next {middle:.1f} s, {most:.1f} at most", flush=True
            )
            os.kill(first.process.pid, signal.SIGKILL)
            first.process.wait()
            first.report("the killed build")
            have = len(first.shards())
            again = Watch(out, hub.endpoint, flags)
            seconds = again.until(lambda: len(again.shards()) > have)
            print(f"started again: the next shard after {seconds:.1f} s", flush=True)
            print(f"complete after {again.until(lambda: False):.0f} s", flush=True)
            again.report("the second build")
            print(out.with_suffix(".log").read_text().splitlines()[-1])
            manifest = json.loads((out / "manifest.json").read_bytes())
            assert manifest["complete"] and sum(s["tokens"] for s in manifest["shards"]) == manifest["tokens"]
            start = time.time()
            subprocess.run([sys.executable, ROOT / "fineweb.py", "--out", out, *flags], check=True,
                           env={**os.environ, "HF_ENDPOINT": hub.endpoint})  # fmt: skip
            print(
                f"and once more, where all is there: {time.time() - start:.1f} s; requests {sum(hub.requests.values())}"
            )


if __name__ == "__main__":
    main()
