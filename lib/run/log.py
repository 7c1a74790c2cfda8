"""log.txt, its kinds of records, and the clock. Lines are written complete; a full disk only delays them."""

import contextlib
import os
import re
import time
from collections import Counter, deque

import torch

from lib.console import UserError, say
from lib.files import atomic_write

# number formats by kind of record; any other kind is allowed, too, and has six digits
FORMATS = {"train": ".6f", "val": ".4f", "hella": ".4f", "lr": ".4e", "norm": ".4f", "sample": ""}
UNLOGGED = ("tokens_per_second", "mfu")  # they differ between identical runs: for the tracker only
METRICS = {"train": "train_loss", "val": "val_loss"}  # names in main's result; other kinds keep theirs
RECORD = re.compile(rb"(\d+) ([A-Za-z_]\S*) (\S[^\0-\x1f]*)")  # step, kind, value


def number_of(kind, value):
    """A record's value as a float. Raises UserError for what log.txt cannot hold."""
    if not re.fullmatch(r"[A-Za-z_]\S*", kind):
        raise UserError(f"{kind!r} cannot be a kind of record: it must begin with a letter and have no spaces")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        raise UserError(f"the record {kind} is {value!r:.200}, not a number") from None


class Stopwatch(Counter):
    """Seconds by activity, as text the share of each. last: of the latest; recent: of the latest training steps."""

    def __init__(self):
        super().__init__()
        self.recent = deque(maxlen=101)

    @contextlib.contextmanager
    def timing(self, what):
        start = time.perf_counter()
        yield
        if torch.cuda.is_initialized():  # the device may still be busy
            torch.cuda.synchronize()
        self.last = time.perf_counter() - start
        self[what] += self.last
        if what == "training":
            self.recent.append(self.last)

    def __str__(self):
        return ", ".join(f"{what} {seconds / self.total():.1%}" for what, seconds in self.most_common())


def time_text(seconds):
    return f"{seconds // 3600:.0f}h{seconds % 3600 // 60:02.0f}m" if seconds >= 60 else f"{seconds:.0f}s"


class Log:
    """Records of the steps before `step` are kept, later ones are written again. New ones wait in memory while the file
    cannot be written. It stays open: on network disks, opening it at every step would wait for the server."""

    def __init__(self, path, step):
        self.path = path
        self.file = None
        self.waiting = b""
        self.failing = False
        self.end = 0  # of the file, when it was written
        rewind_log(path, step)

    def record(self, step, values):
        """Add the records of a step, a dict from kind to number."""
        for kind, value in [item for item in values.items() if item[0] not in UNLOGGED]:
            self.waiting += f"{step} {kind} {value:{FORMATS.get(kind, '.6g')}}\n".encode()
        self.flush()

    def open(self):
        """Open the file at its path, again if another one, or none, is there by now."""
        if self.file:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):
                    return
            say(f"warning: {self.path} was moved, removed or replaced: writing a new one")
            self.file.close()
            self.file, self.end = None, 0
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def flush(self, sync=False):
        """Write the waiting records; returns whether all are in the file. `sync`: have the disk store them, too."""
        try:
            self.open()
            end = self.file.seek(0, os.SEEK_END)
            if end < self.end:
                say(f"warning: {self.path} was truncated: {self.end - end:,} bytes of records are lost")
                self.end = end
            if self.file.write(self.waiting) < len(self.waiting):  # one write(2): if that fails, it wrote nothing
                self.file.truncate(end)
                raise OSError("only part of a record was written")
            self.end = end + len(self.waiting)
            self.waiting = b""
            self.failing = False
            if sync:
                os.fsync(self.file.fileno())
        except OSError as error:
            if not self.failing:
                say(f"WARNING: {self.path} CANNOT BE WRITTEN, its records wait in memory: {error}")
            self.failing = True
        return not self.failing

    def close(self):
        if self.waiting and not self.flush():
            say(f"WARNING: {self.path} lacks its last records, from step {self.waiting.split()[0].decode()} on")
        if self.file:
            self.file.close()


def lines_of(path):
    """The lines of a log.txt, the last one possibly incomplete. Accepts a byte order mark and \\r\\n line ends, which
    some editors write."""
    return [line.rstrip(b"\r") for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")]


def rewind_log(path, step):
    """Keep the records of the steps before `step`, of any kind: the run writes the later ones again. Those, and lines
    that are not records, as a power cut leaves them, are moved to a file beside it, log_dropped.txt."""
    kept, dropped = [], []
    try:
        for line in filter(None, lines_of(path) if path.exists() else []):
            match = RECORD.fullmatch(line)
            (kept if match and int(match[1]) < step else dropped).append(line + b"\n")
        if dropped:
            copy = path.with_name(f"{path.stem}_dropped.txt")
            with open(copy, "ab") as file:
                file.write(b"".join(dropped))
                file.flush()
                os.fsync(file.fileno())
            say(f"{path}: {len(dropped)} lines moved to {copy.name}: from step {step} on, or malformed")
        if path.exists():
            with atomic_write(path) as file:
                file.write(b"".join(kept))
    except OSError as error:
        raise UserError(f"cannot rewrite {path}: {error}. Make room or fix its permissions, and resume") from None
