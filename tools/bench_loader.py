"""
Can the disk and the loader feed the GPUs? Sequences per second from your shards, from disk and from the page cache.

    python -m tools.bench_loader --data_dir edu_fineweb10B --ranks 8

Each rank is a process that takes batches as train_gpt2.py does: random sequences of the whole stream. First cold, with
the shards dropped from the page cache (on Linux; caches of the disk or of a virtual machine's host remain), then
the same batches warm. A step waits for a batch only if that takes longer than the device's work in the meantime.
"""

import argparse
import multiprocessing
import os
import statistics
import time

import torch

from lib.console import run_as_command, say
from lib.data.folder import ShardFolder
from lib.data.shards import open_file
from train_gpt2 import DataLoaderLite, TrainConfig

GPU = 553_000  # tokens/s of GPT-2 124M on one H200


def drop_page_cache(folder):
    """Drop the shards from the page cache, if the system can."""
    for shard in folder.shards["train"] if hasattr(os, "posix_fadvise") else ():
        os.posix_fadvise(open_file(shard.path).fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_batches(rank, ranks, folder, B, T, batches, barrier):
    """One rank: the seconds for each batch, first cold, then for the same batches warm."""
    torch.set_num_threads(1)
    open_file.cache_clear()
    seconds = {"cold": [], "warm": []}
    for cache in seconds:
        barrier.wait()
        if cache == "cold" and rank == 0:
            drop_page_cache(folder)
        barrier.wait()
        loader = DataLoaderLite(B, T, rank, ranks, "train", folder, seed=ranks)
        for _ in range(batches):
            start = time.perf_counter()
            loader.next_batch()
            seconds[cache].append(time.perf_counter() - start)
    return seconds


def main(args):
    folder = ShardFolder(args.data_dir)
    found = sum(shard.length for shard in folder.shards["train"]) // args.T
    say(f"{found:,} sequences of {args.T} tokens in {args.data_dir}/, {args.batches} batches of {args.B} a rank")
    if not hasattr(os, "posix_fadvise"):
        say("this system cannot drop the shards from the page cache: the cold figures are warm, too")
    say("ranks | cache | ms a batch: median, slowest | sequences/s | tokens/s | times what as many H200s need")
    for ranks in sorted({1, args.ranks}):
        with multiprocessing.Manager() as manager, multiprocessing.Pool(ranks) as pool:
            shared = ranks, folder, args.B, args.T, args.batches, manager.Barrier(ranks)
            seconds = pool.starmap(read_batches, [(rank, *shared) for rank in range(ranks)], chunksize=1)
        for cache in ("cold", "warm"):
            batches = sorted(second for of_rank in seconds for second in of_rank[cache])
            rate = ranks * args.B * args.batches / max(sum(of_rank[cache]) for of_rank in seconds)
            say(
                f"{ranks:5d} | {cache} | {1e3 * statistics.median(batches):.2f}, {1e3 * batches[-1]:.2f} | "
                f"{rate:,.0f} | {rate * args.T / 1e6:.2f}M | {rate * args.T / GPU / ranks:.1f}"
            )


def parse_args():
    config = TrainConfig()
    parser = argparse.ArgumentParser(description="Measure the loader on your shards and disk", allow_abbrev=False)
    parser.add_argument("--data_dir", default=config.data_dir, help="folder of shards (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=8, help="processes; 1 is measured, too (default: %(default)s)")
    parser.add_argument(
        "--B", type=int, default=config.micro_batch_size, help="sequences of a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--T", type=int, default=config.sequence_length, help="tokens of a sequence (default: %(default)s)"
    )
    parser.add_argument("--batches", type=int, default=100, help="batches of each rank (default: %(default)s)")
    args = parser.parse_args()
    if min(args.ranks, args.B, args.T, args.batches) < 1:
        parser.error("all numbers must be 1 or more")
    return args


if __name__ == "__main__":
    run_as_command(main, parse_args())
