"""
Kill a run again and again, damage its checkpoints, and compare what it becomes with a run that nobody disturbed.

    python tests/chaos.py                     # 50 kills, restarts with 1 or 2 ranks at random
    python tests/chaos.py --ranks 1           # the same with 1 rank: bit for bit

Each kill is a SIGKILL of the whole process tree (torchrun and its ranks, or a single process) at a random instant,
often within a save or a removal of checkpoints, since this run saves at every step. The same command with --init_from
resume goes on. In the end log.txt and the weights must be those of the undisturbed run: to the last bit with one rank,
to 1e-5 where the number of ranks changes, which changes the order of sums. The damages are truncations and flipped bits
of the newest checkpoint, one at a time: each must be noticed, and the checkpoint before it taken.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from support import ROOT, TINY, flags_of, read_log, write_shards

from lib.checkpoint import load_checkpoint, newest_whole_checkpoint
from train_gpt2 import TrainConfig, main


def losses_of(log_dir):
    records = [line.split() for line in read_log(log_dir).splitlines()]
    keys = [(int(step), kind) for step, kind, _ in records]
    assert len(keys) == len(set(keys)), "a step stands in the log twice"
    return {key: float(value) for key, (_, _, value) in zip(keys, records, strict=True)}


def run_with_kills(config, kills, ranks, rng):
    """Run to the end through `kills` kills; returns (kills done, checkpoints lost, kills within a save)."""
    done = lost = within = 0
    log_dir = Path(config.log_dir)
    while True:
        world_size = rng.choice(ranks)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        command = [sys.executable, *(torchrun if world_size > 1 else []), str(ROOT / "train_gpt2.py")]
        process = subprocess.Popen(
            [*command, *flags_of(config, init_from="resume")], env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
        )  # fmt: skip
        newest = max((int(p.stem[6:]) for p in log_dir.glob("*.pt")), default=0)
        while process.poll() is None and done < kills:  # until it has gone on a little: then at any instant
            if max((int(p.stem[6:]) for p in log_dir.glob("*.pt")), default=0) > newest:
                time.sleep(rng.random() * 0.1)
                break
            time.sleep(0.01)
        if process.poll() is None and done < kills:
            saved = {p.name for p in log_dir.glob("*.pt")}
            parent = psutil.Process(process.pid)
            for victim in (parent, *parent.children()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
            process.wait()
            done += 1
            within += any(log_dir.glob("*.tmp"))
            survivors = []
            for path in sorted(log_dir.glob("*.pt")):
                load_checkpoint(path)  # raises where a committed checkpoint is damaged
                survivors.append(path.name)
            lost += not survivors or max(survivors) < max(saved)
        elif process.wait() == 0:
            return done, lost, within
        else:
            raise SystemExit(f"the run failed with {process.returncode}")


def damage(log_dir, count, rng):
    """Truncate or flip a bit of the newest checkpoint `count` times; returns how many were not noticed."""
    newest = max(log_dir.glob("*.pt"))
    content = newest.read_bytes()
    expected = sorted(log_dir.glob("*.pt"))[-2]
    silent = 0
    for i in range(count):
        if i % 2:
            broken = bytearray(content)
            broken[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            broken = content[: rng.randrange(len(content))]
        newest.write_bytes(broken)
        silent += newest_whole_checkpoint(log_dir) != expected
    newest.write_bytes(content)
    return silent


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--damages", type=int, default=400, help="half of them truncations, half flipped bits")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks to restart with")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, folder, start = random.Random(args.seed), Path(tempfile.mkdtemp()), time.time()
    write_shards(folder / "data", [1500, 5000, 3001, 7003])
    steps = 6 * args.kills
    settings = {**TINY, "data_dir": str(folder / "data"), "max_steps": steps, "checkpoint_every": 1, "max_lr": 1e-3}
    whole = TrainConfig(**{**settings, "log_dir": str(folder / "whole"), "checkpoint_every": steps})
    killed = TrainConfig(**{**settings, "log_dir": str(folder / "killed")})

    with contextlib.redirect_stdout(io.StringIO()):
        main(whole)
    kills, lost, within = run_with_kills(killed, args.kills, args.ranks, rng)
    expected, found = losses_of(whole.log_dir), losses_of(killed.log_dir)
    exact = args.ranks == [1]
    tolerance = {"train": 0 if exact else 1.1e-5, "val": 0 if exact else 1.1e-4}  # the log rounds to 6 and 4 digits
    differ = sum(abs(value - found.get(key, 1e9)) > tolerance[key[1]] for key, value in expected.items())
    differ += len(found.keys() - expected.keys())
    a, b = (load_checkpoint(Path(c.log_dir) / f"model_{steps:05d}.pt")["model"] for c in (whole, killed))
    weights = max((a[key] - b[key]).abs().max().item() for key in a)
    print(
        f"kills {kills} ({within} within a save), losses that differ {differ} of {len(expected)}, weights "
        f"within {weights:.1e}, checkpoints lost {lost}, {time.time() - start:.0f} seconds"
    )
    with contextlib.redirect_stdout(io.StringIO()):
        silent = damage(Path(killed.log_dir), args.damages, rng)
    print(f"damages {args.damages}, not noticed {silent}")
    shutil.rmtree(folder)
    sys.exit(bool(differ or lost or silent))
