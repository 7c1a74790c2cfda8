"""
Tokens per second and peak memory of fineweb.py, beside the pipeline of the well-known tutorial, on the same text.

    python tests/bench_fineweb.py TEXTS.parquet             # its documents, repeated to 60 MB
    python tests/bench_fineweb.py TEXTS.parquet --megabytes 240 --workers 4 --repeats 5

The tutorial's: a multiprocessing.Pool fed one document at a time with imap, chunksize 16; each worker encodes with
encode_ordinary into a uint16 array; the parent copies into a shard. Both read the same .parquet, run alternately in
fresh processes, and are timed from before reading to after the last shard. Memory is the highest resident set of the
parent, and of any worker. On a machine that is busy, compare the CPU seconds. "parent alone" has workers that return at
once: more tokens/s no number of workers can give.
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import fineweb

SHARD_SIZE = 5_000_000


def tutorial_tokenize(text):
    encoder = fineweb.get_tokenizer()
    tokens = [fineweb.EOT]
    tokens.extend(encoder.encode_ordinary(text))
    tokens = np.array(tokens)
    assert (tokens >= 0).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def tutorial(source, out, workers):
    import pyarrow.parquet as pq

    batches = pq.ParquetFile(source).iter_batches(1000, columns=["text"])
    texts = itertools.chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
    shard, filled, total, index = np.empty(SHARD_SIZE, np.uint16), 0, 0, 0
    with multiprocessing.Pool(workers) as pool:
        for tokens in pool.imap(tutorial_tokenize, texts, chunksize=16):
            total += len(tokens)
            while len(tokens):
                taken = min(len(tokens), SHARD_SIZE - filled)
                shard[filled : filled + taken] = tokens[:taken]
                filled, tokens = filled + taken, tokens[taken:]
                if filled == SHARD_SIZE:
                    np.save(f"{out}_{index}", shard)
                    index, filled = index + 1, 0
        np.save(f"{out}_{index}", shard[:filled])
    return total


def no_work(texts):
    """What fineweb.tokenize returns, in no time: some tokens, about as many as the texts have."""
    return np.ones(sum(map(len, texts)) // 4, "<u2"), len(texts), 0


def measure(kind, source, workers):
    if kind == "parent alone":
        no_work.__module__, no_work.__qualname__ = "fineweb", "tokenize"  # so that the workers find it by that name
        fineweb.tokenize = no_work
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        if kind == "tutorial":
            tokens = tutorial(source, f"{folder}/shard", workers)
        else:
            tokens = fineweb.build(source, f"{folder}/out", SHARD_SIZE, workers)["tokens"]
        seconds = time.perf_counter() - start
    result = {"tokens": tokens, "rate": round(tokens / seconds)}
    for name, who in (("parent", resource.RUSAGE_SELF), ("workers", resource.RUSAGE_CHILDREN)):
        used = resource.getrusage(who)
        result |= {f"{name}_cpu_s": round(used.ru_utime + used.ru_stime, 2), f"{name}_mib": used.ru_maxrss // 1024}
    return result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("texts")
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        print("result", json.dumps(measure(args.kind, args.texts, args.workers)))
        return
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/texts.parquet"
        table = pq.read_table(args.texts, columns=["text"])
        with pq.ParquetWriter(source, table.schema) as writer:
            for _ in range(max(1, args.megabytes * 10**6 // table.nbytes)):
                writer.write_table(table, row_group_size=1000)
        runs = {"tutorial": [], "tutorial, 1 worker": [], "fineweb.py": [], "fineweb.py, 1 worker": []}
        runs["parent alone"] = []
        for _, kind in itertools.product(range(args.repeats), runs):
            workers = 1 if "1 worker" in kind else args.workers
            command = [sys.executable, __file__, source, "--kind", kind.split(",")[0], "--workers", str(workers)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs[kind].append(json.loads(output.split("result ")[-1]))
            print(kind, runs[kind][-1], flush=True)
    median = {kind: statistics.median(run["rate"] for run in of_kind) for kind, of_kind in runs.items()}
    for kind, rate in median.items():
        print(f"{kind}: {rate / 1e6:.2f}M tokens/s, median of {args.repeats}")
    ratio = median["fineweb.py"] / median["tutorial"]
    print(f"ratio {ratio:.2f} with {args.workers} workers; {median['fineweb.py'] / median['fineweb.py, 1 worker']:.2f} "
          "times the speed of 1 worker")  # fmt: skip


if __name__ == "__main__":
    main()
