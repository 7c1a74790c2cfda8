"""
Disturb a run in every way at hand, again and again, and compare what it becomes with a run that nobody disturbed.

    python tests/chaos.py                     # 240 faults, restarts with 1 or 2 ranks at random
    python tests/chaos.py --ranks 1           # the same with 1 rank: bit for bit

The run saves at every step, on a disk of 6 MB where the system lets us mount one. While it runs, the disk fills to the
last byte and is freed again, the console goes away, and files of other people appear beside its own. Then comes SIGKILL
for the whole process tree at a random instant, often within a save, or SIGTERM; and sometimes a truncation or a flipped
bit in the newest checkpoint. The same command with --init_from resume goes on.

In the end log.txt and the weights must be those of the undisturbed run: to the last bit with one rank, to 1e-5 where
the number of ranks changes, which changes the order of sums. A checkpoint is lost where the newest one that was there
before a kill is not there or not whole after it, where a damage goes unnoticed, or where another's file is gone.
"""

import argparse
import contextlib
import io
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
from support import TINY, command_of, environment, flags_of, read_log, write_shards

from lib.checkpoint import list_checkpoints, load_checkpoint, newest_whole_checkpoint, step_of
from lib.console import UserError
from train_gpt2 import TrainConfig, main

SETTINGS = {**TINY, "n_layer": 1, "total_batch_size": 128, "val_every": 20, "max_lr": 1e-3, "min_lr_ratio": 1.0}
FOREIGN = ("model_{}.pt", "model_{:05d}_best.pt", "model_best_{}.pt", "notes_{}.txt.7.tmp", "{}.tmp")


class Chaos:
    """faults: how many so far, by kind; lost: how many checkpoints or files of others."""

    def __init__(self, folder, ranks, rng):
        self.log_dir, self.ranks, self.rng = folder / "disk" / "log", ranks, rng
        self.faults, self.lost, self.within, self.foreign = Counter(), 0, 0, []
        self.console, self.errors, self.filler = folder / "console", folder / "errors", folder / "disk" / "filler"
        self.config = TrainConfig(
            **{**SETTINGS, "data_dir": str(folder / "data"), "log_dir": str(self.log_dir), "checkpoint_every": 1}
        )

    def newest(self):
        with contextlib.suppress(FileNotFoundError):  # removed while we look
            return max(map(step_of, list_checkpoints(self.log_dir)), default=0) if self.log_dir.exists() else 0
        return self.newest()

    def start(self, max_steps):
        flags = flags_of(self.config, init_from="resume", max_steps=max_steps)
        world_size = self.rng.choice(self.ranks)
        command = command_of("train_gpt2.py", *flags, ranks=world_size if world_size > 1 else 0)
        self.kind = self.rng.choice(("pipe", "pipe", "/dev/full", "file"))
        output = subprocess.PIPE if self.kind == "pipe" else self.console if self.kind == "file" else Path("/dev/full")
        with contextlib.ExitStack() as stack:
            stdout = output if output == subprocess.PIPE else stack.enter_context(open(output, "w"))
            stderr = stack.enter_context(open(self.errors, "w"))
            self.process = subprocess.Popen(command, env=environment(), stdout=stdout, stderr=stderr)
        self.faults["console lost"] += self.kind == "/dev/full"

    def end(self, expected):
        if self.process.wait(timeout=300) not in expected:
            sys.exit(f"the run ended with {self.process.returncode}, not {expected}: {self.errors.read_text()}")

    def wait_for_progress(self):
        """Until it has saved a step that it had not saved before."""
        before, deadline = self.newest(), time.monotonic() + 120
        while self.newest() <= before:
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the run makes no progress at step {before}: {self.errors.read_text()}")
            time.sleep(0.01)

    def fill_disk(self):
        with open(self.filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        self.faults["full disk"] += 1
        time.sleep(self.rng.random() * 0.3)

    def free_disk(self):
        self.filler.unlink(missing_ok=True)

    def lose_console(self):
        if self.process.stdout and not self.process.stdout.closed:
            self.process.stdout.close()
            self.faults["console lost"] += 1

    def add_foreign_file(self):
        path = self.log_dir / self.rng.choice(FOREIGN).format(len(self.foreign))
        path.touch()
        self.foreign.append(path)
        self.faults["foreign file"] += 1

    def stop(self):
        """SIGKILL for all, or SIGTERM for one; then every checkpoint must be whole, the newest one among them."""
        parent = psutil.Process(self.process.pid)
        victims, before = [parent, *parent.children()], self.newest()
        if self.rng.random() < 0.2 and not self.filler.exists():
            victims[-1].terminate()
            self.end({0, -signal.SIGTERM})
            self.faults["SIGTERM"] += 1
        else:
            for victim in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
            self.process.wait()
            psutil.wait_procs(victims)
            self.faults["SIGKILL"] += 1
            self.within += any(self.log_dir.glob("model_*.pt.*.tmp"))
        for path in list_checkpoints(self.log_dir):
            try:
                load_checkpoint(path)
            except UserError:
                self.lost += 1
        self.lost += self.newest() < before

    def damage(self):
        """Truncate the newest checkpoint, or flip a bit of it; the one before must be taken."""
        *_, before, newest = list_checkpoints(self.log_dir)
        content = bytearray(newest.read_bytes())
        if self.rng.random() < 0.5:
            content = content[: self.rng.randrange(len(content))]
        else:
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        newest.write_bytes(content)
        with contextlib.redirect_stdout(io.StringIO()):
            self.lost += newest_whole_checkpoint(self.log_dir)[0] != before
        self.faults["damage"] += 1

    def disturb(self, count):
        """One start of the run after the other until there are `count` faults; then let it end in peace."""
        while self.faults.total() < count:
            self.start(max_steps=10**6)
            self.wait_for_progress()
            for _ in range(self.rng.randrange(5, 12)):
                self.rng.choice((self.fill_disk, self.fill_disk, self.lose_console, self.add_foreign_file))()
                if self.rng.random() < 0.8:  # else it stays full, perhaps until the kill
                    self.free_disk()
                time.sleep(self.rng.random() * 0.1)
            self.stop()
            self.free_disk()
            if len(list_checkpoints(self.log_dir)) > 1 and self.rng.random() < 0.5:
                self.damage()
        last = self.newest() + 5
        self.start(last)
        self.lose_console()
        self.end({0})
        self.lost += sum(not path.exists() for path in self.foreign)
        return last


def losses_of(log_dir):
    records = [line.split() for line in read_log(log_dir).splitlines()]
    keys = [(int(step), kind) for step, kind, _ in records]
    assert len(keys) == len(set(keys)), "a step stands in the log twice"
    return {key: float(value) for key, (_, _, value) in zip(keys, records, strict=True)}


def run(folder, args):
    chaos, start = Chaos(folder, args.ranks, random.Random(args.seed)), time.time()
    write_shards(folder / "data", [1500, 5000, 3001, 7003])
    steps = chaos.disturb(args.faults)
    whole = {**SETTINGS, "data_dir": str(folder / "data"), "max_steps": steps, "checkpoint_every": steps}
    with contextlib.redirect_stdout(io.StringIO()):
        main(TrainConfig(**whole, log_dir=str(folder / "whole")))
    expected, found = losses_of(folder / "whole"), losses_of(chaos.log_dir)
    exact = set(args.ranks) == {1}
    rounding = {"train": 1.1e-5, "val": 1.1e-4, "lr": 0, "norm": 1e-2}  # the log rounds to 6 and 4 digits
    tolerance = dict.fromkeys(rounding, 0) if exact else rounding
    differ = sum(abs(value - found.get(key, 1e9)) > tolerance[key[1]] for key, value in expected.items())
    differ += len(found.keys() - expected.keys())
    a, b = (load_checkpoint(d / f"model_{steps:05d}.pt")["model"] for d in (folder / "whole", chaos.log_dir))
    weights = max((a[key] - b[key]).abs().max().item() for key in a)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(chaos.faults.items()))
    print(
        f"{chaos.faults.total()} faults ({kinds}; {chaos.within} kills within a save), losses that differ {differ} of "
        f"{len(expected)}, weights within {weights:.1e}, lost {chaos.lost}, {time.time() - start:.0f} seconds"
    )
    return bool(differ or chaos.lost or (exact and weights))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=240)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks to restart with")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            sys.exit("chaos.py fills a small disk, which it takes the right to mount: run it as root on Linux")
        try:
            failed = run(Path(folder), args)
        finally:
            subprocess.run(["umount", "-l", disk], check=True)
    sys.exit(failed)
