"""
The log_dir of a run, for which rank 0 writes: its lock, log.txt, checkpoints, and what is drawn and tracked beside it.
"""

import contextlib
import json
import os
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from lib.checkpoint import NAME, load_checkpoint, newest_whole_checkpoint, path_of, save_checkpoint
from lib.console import Stopped, UserError, say
from lib.distributed import from_rank_0, group_device, is_main_rank, sum_over_ranks
from lib.files import atomic_write, list_folder, lock_folder
from lib.run import summary
from lib.run.log import METRICS, Log, rewind_log
from lib.run.tracker import Tracker, start_beside, wait_for


class RunFolder:
    """`with RunFolder(...) as folder:` refuses a folder that holds another run, and releases it at the end.

    saved: the path of the last checkpoint, False if it could not be written, None if none was due yet. on_stop: what
    saves the run if a signal stops it.
    """

    def __init__(self, path, resume, keep_checkpoints, tracker=""):
        self.path, self.resume, self.keep_checkpoints, self.saved = Path(path), resume, keep_checkpoints, None
        self.stack, self.tracker = contextlib.ExitStack(), Tracker(tracker)
        self.log, self.samples, self.drawing = Log(self.path / "log.txt"), Log(self.path / "samples.txt"), None
        self.on_stop = None

    def __enter__(self):
        # a restart by torchrun --max-restarts resumes by itself, even on machines whose own count is still 0
        restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device=group_device())
        self.restarted = sum_over_ranks(restarts).item() > 0
        if not self.resume and not self.restarted:
            self.refuse_other_run()
        return self

    def __exit__(self, kind, error, trace):
        try:
            if isinstance(error, Stopped) and self.on_stop:
                self.on_stop()
        finally:
            self.close()

    def close(self):
        wait_for(self.drawing)
        self.stack.close()

    def refuse_other_run(self):
        names = [path.name for path in list_folder(self.path)]
        if any(name == "log.txt" or NAME.fullmatch(name) for name in names):
            raise UserError(f"{self.path}/ holds a run: give --init_from resume, delete it, or give another --log_dir")

    def open(self, config, device):
        """Lock the folder for this run. Returns (config, its newest complete checkpoint or None); the config of a
        resumed run says what it was started from."""
        path = from_rank_0(str(self.lock() or "") if is_main_rank() else None)
        # with mmap the ranks of a machine share its memory until it is on their GPUs; kept on, it would hold the disk
        checkpoint = load_checkpoint(path, mmap=device.type == "cuda") if path else None
        self.saved = Path(path) if path else None
        return replace(config, init_from=self.begun_from(config.init_from, checkpoint)), checkpoint

    def lock(self):
        """Lock the folder; return the path of its newest complete checkpoint, None if there is none.

        Raises UserError if it holds a run, unless this run resumes it or is a restart by the torchrun that began it,
        whose id is noted in the lock.
        """
        launch = f", torchrun {os.environ['TORCHELASTIC_RUN_ID']}" if "TORCHELASTIC_RUN_ID" in os.environ else ""
        if launch.endswith(" none"):  # which all launches with --master_port are called
            launch += f" {os.getppid()}"
        before = self.stack.enter_context(lock_folder(self.path, launch))
        if not self.resume and not (self.restarted and before.endswith(launch)):
            try:
                self.refuse_other_run()
            except UserError:  # otherwise a restart of this launch would mistake the run for its own
                (self.path / "lock").write_text(before)
                raise
        self.stack.callback(self.log.close)
        self.stack.callback(self.samples.close)
        return newest_whole_checkpoint(self.path)

    def begun_from(self, init_from, checkpoint):
        """What the run was started from; a resume before the first checkpoint starts from there again."""
        if init_from != "resume":
            return init_from
        try:
            text = (self.path / "config.json").read_text() if is_main_rank() and not checkpoint else "{}"
            began = checkpoint["train_config"] if checkpoint else json.loads(text)
            return from_rank_0(began.get("init_from", "scratch"))
        except (OSError, ValueError, AttributeError):
            return from_rank_0("scratch")

    def begin(self, step, train_config):
        """Start recording at this step, in log.txt and with the tracker."""
        try:
            with atomic_write(self.path / "config.json") as file:
                file.write(json.dumps(train_config, indent=1).encode() + b"\n")
        except OSError as error:
            say(f"warning: {self.path}/config.json cannot be written: {error}")
        rewind_log(self.path / "log.txt", step)
        rewind_log(self.path / "samples.txt", step)
        self.tracker.start(self.path, step, train_config)
        self.stack.callback(self.tracker.close)

    def record(self, step, values):
        """Add records of a step to log.txt and to the tracker."""
        self.log.record(step, values)
        self.tracker.send(step, {METRICS.get(kind, kind): value for kind, value in values.items()})

    def save(self, contents):
        """Save a checkpoint; the log is never behind it."""
        # while updates are skipped, keep the older ones: the current weights may be broken
        prune = not contents["nonfinite"]
        path = path_of(self.path, contents["step"])
        if flushed := self.log.flush(sync=True):
            saved = save_checkpoint(self.path, contents, self.keep_checkpoints, prune)
        else:
            say(f"WARNING: {path} COULD NOT BE SAVED: log.txt must be written first")
        self.saved = flushed and saved and path

    def draw(self, last):
        """Have tools/plot.py draw curve.png in a process of its own, unless the previous one is still running."""
        if last:
            wait_for(self.drawing)
        if find_spec("matplotlib") and (self.drawing is None or self.drawing.poll() is not None):
            folder, nowhere = self.path.absolute(), {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self.drawing = start_beside("-m", "tools.plot", folder, "--out", folder / "curve.png", **nowhere)

    def summarize(self, title, rows, config, facts):
        """Print the results of the run, and write them as a page."""
        for what, value in rows:
            say(f"{what}: {value}")
        try:
            wait_for(self.drawing)
            summary.write_page(self.path, title, rows, config, facts)
        except OSError as error:
            say(f"warning: {self.path}/summary.md cannot be written: {error}")
        if self.saved:
            names = [name for name in ("summary.md", "curve.png", "samples.txt") if (self.path / name).exists()]
            say(f"All is in {self.path}/: {', '.join(['the checkpoints', 'log.txt', *names])}")

    def check_saved(self):
        """Raise UserError unless the last checkpoint and all of log.txt are on the disk."""
        if not is_main_rank():
            return
        if not self.path.is_dir():
            raise UserError(f"{self.path}/ no longer exists: start again, or restore it and resume")
        if self.saved is False or not self.log.flush(sync=True):
            raise UserError(
                f"the last checkpoint could not be saved, or not all of log.txt: make room in {self.path}/ and resume"
            )
