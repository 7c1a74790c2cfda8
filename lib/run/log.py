"""
log.txt and the console: each metric formatted once, whole records, none lost to a full disk that gets room again; and
reading them back. And the clock.
"""

import contextlib
import os
import re
import time
from collections import Counter
from typing import NamedTuple

import torch

from lib.console import UserError, say
from lib.files import atomic_write

RECORD = re.compile(rb"(\d+) (train|val|hella) -?(\d+\.\d+|nan|inf)")


class Metric(NamedTuple):
    name: str  # in what main returns
    label: str  # on the console
    format: str


METRICS = {  # by the kind of record in log.txt
    "train": Metric("train_loss", "loss", ".6f"),
    "val": Metric("val_loss", "val loss", ".4f"),
    "hella": Metric("hella", "HellaSwag", ".4f"),
}


class Stopwatch(Counter):
    """Seconds by what they were spent on; as a string, their shares. `last` is the latest of them."""

    @contextlib.contextmanager
    def timing(self, what):
        start = time.perf_counter()
        yield
        if torch.cuda.is_initialized():  # the device may still be at work
            torch.cuda.synchronize()
        self.last = time.perf_counter() - start
        self[what] += self.last

    def __str__(self):
        return ", ".join(f"{what} {seconds / self.total():.1%}" for what, seconds in self.most_common())


def rates(seconds, tokens, flops_per_token, peak_tflops, steps_left):
    """The speed of a step of so many tokens, as numbers and as text; with MFU, the share of the peak, where that is
    known, not 0."""
    speed, left = tokens / seconds, seconds * steps_left
    numbers = {"tokens_per_second": speed}
    if peak_tflops:
        numbers["mfu"] = speed * flops_per_token / (peak_tflops * 1e12)
    mfu = f" | MFU {numbers['mfu']:.1%}" if peak_tflops else ""
    time_left = f"{left // 3600:.0f}h{left % 3600 // 60:02.0f}m" if left >= 60 else f"{left:.0f}s"
    return numbers, f"{seconds * 1000:.2f} ms | {speed:,.0f} tok/s{mfu} | {time_left} left"


class Log:
    """Records wait in memory while the disk does not take them. The file stays open: on network disks, opening and
    closing it at every step would wait for the server each time."""

    def __init__(self, path):
        self.path, self.file, self.waiting, self.failing = path, None, b"", False

    def record(self, step, kind, value):
        self.waiting += f"{step} {kind} {value:{METRICS[kind].format}}\n".encode()
        self.flush()

    def flush(self, sync=False):
        """Write what waits; returns whether all of it is in the file, which `sync` makes durable."""
        try:
            if self.file is None:
                self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            end = self.file.seek(0, os.SEEK_END)
            try:
                if self.file.write(self.waiting) < len(self.waiting):
                    raise OSError("the disk took a part of a record")
            except OSError:
                with contextlib.suppress(OSError):
                    self.file.truncate(end)
                raise
            self.waiting, self.failing = b"", False
            if sync:
                os.fsync(self.file.fileno())
        except OSError as error:
            if not self.failing:
                say(f"WARNING: {self.path} CANNOT BE WRITTEN, its records wait in memory: {error}")
            self.failing = True
        return not self.failing

    def close(self):
        if self.file and not self.flush():
            say(f"WARNING: {self.path} lacks its last records, from {self.waiting.split()[0].decode()} on")
        if self.file:
            self.file.close()


def cut_log(path, step):
    """Keep the whole records of the steps before `step`: the run writes the others again. Lines that are no records,
    as a power cut leaves them, are dropped and said."""
    try:
        if path.exists():
            *lines, _torn = path.read_bytes().split(b"\n")
            records = [match for line in lines if (match := RECORD.fullmatch(line))]
            if len(records) < len(lines):
                say(f"warning: {path} has {len(lines) - len(records)} lines that are no records: dropped")
            with atomic_write(path) as file:
                file.write(b"".join(record[0] + b"\n" for record in records if int(record[1]) < step))
    except OSError as error:
        raise UserError(f"cannot rewrite {path}: {error}. Make room, or mend its permissions, and resume") from None


def read_log(path):
    """{kind: {step: value}} of a log.txt. Where its steps go back, since a run was resumed or a second one follows, the
    earlier records from that step on are dropped. Raises UserError where none are left."""
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. Give the log.txt of a run, or its log_dir") from None
    records, last, strange = {}, 0, 0
    for line in lines:
        if not RECORD.fullmatch(line):
            strange += 1
            continue
        step, kind, value = line.decode().split()
        step, value = int(step), float(value)
        if step < last:
            say(f"warning: {path} goes back from step {last} to {step}: the later records are taken")
            kept = {kind: {s: v for s, v in old.items() if s < step} for kind, old in records.items()}
            records = {kind: old for kind, old in kept.items() if old}
        records.setdefault(kind, {})[step], last = value, step
    if strange:
        say(f"warning: {path} has {strange} lines that are no records: skipped")
    if not records:
        raise UserError(f"{path} has no records{'' if lines else ' yet'}, which are lines like 250 val 6.2907")
    return records
