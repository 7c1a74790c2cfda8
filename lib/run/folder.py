"""
The log_dir of a run, which rank 0 holds: its lock, log.txt and checkpoints.
"""

import contextlib
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

from lib.console import UserError, say
from lib.files import ROOT, list_folder, lock_folder
from lib.run import checkpoints
from lib.run.log import METRICS, Log, cut_log
from lib.run.tracker import Tracker, start_beside, wait_for


def git_commit():
    """The commit of this code, None where it is no git checkout."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if (ROOT / ".git").exists():
            command = ["git", "-C", ROOT, "rev-parse", "HEAD"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


class RunFolder:
    """saved: the path of the last checkpoint, False where it could not be written, None where none was due yet."""

    def __init__(self, path, keep_checkpoints, tracker=""):
        self.path, self.keep_checkpoints, self.saved = Path(path), keep_checkpoints, None
        self.tracker = Tracker(tracker)
        self.stack, self.log, self.drawing = contextlib.ExitStack(), None, None

    def refuse_other_run(self):
        names = [path.name for path in list_folder(self.path)]
        if any(name == "log.txt" or checkpoints.NAME.fullmatch(name) for name in names):
            raise UserError(f"{self.path}/ holds a run: give --init_from resume, delete it, or give another --log_dir")

    def open(self, resume, restarted):
        """Lock the folder; return the path of its newest whole checkpoint, None where there is none.

        Raises UserError where it holds a run and this is neither to resume it nor a restart by the torchrun that began
        it, whose id stands in the lock.
        """
        launch = f", torchrun {os.environ['TORCHELASTIC_RUN_ID']}" if "TORCHELASTIC_RUN_ID" in os.environ else ""
        if launch.endswith(" none"):  # which all launches with --master_port are called
            launch += f" {os.getppid()}"
        before = self.stack.enter_context(lock_folder(self.path, launch))
        if not resume and not (restarted and before.endswith(launch)):
            try:
                self.refuse_other_run()
            except UserError:  # or a restart of this launch would take the run for its own
                (self.path / "lock").write_text(before)
                raise
        self.log = self.stack.enter_context(contextlib.closing(Log(self.path / "log.txt")))
        return checkpoints.newest_whole_checkpoint(self.path)

    def close(self):
        wait_for(self.drawing)
        self.stack.close()

    def begin(self, step, settings):
        """Let the records begin at this step, in log.txt and with the tracker."""
        cut_log(self.path / "log.txt", step)
        self.tracker.start(self.path, step, settings)
        self.stack.callback(self.tracker.close)

    def record(self, step, kind, value, numbers):
        """Add a record to log.txt, and to the tracker with more numbers of the step."""
        self.log.record(step, kind, value)
        self.tracker.send(step, {METRICS[kind].name: value, **numbers})

    def save(self, contents):
        """Save a checkpoint; the log is never behind it."""
        # while updates are skipped, the older ones stay: these weights may be what is wrong
        prune = not contents["nonfinite"]
        path = self.path / f"model_{contents['step']:05d}.pt"
        if flushed := self.log.flush(sync=True):
            saved = checkpoints.save_checkpoint(self.path, contents, self.keep_checkpoints, prune)
        else:
            say(f"WARNING: {path} COULD NOT BE SAVED: log.txt comes first")
        self.saved = flushed and saved and path

    def draw(self, flags, last):
        """Have tools/plot.py draw curve.png beside the run; one that is not done yet is not disturbed."""
        if last:
            wait_for(self.drawing)
        if find_spec("matplotlib") and (self.drawing is None or self.drawing.poll() is not None):
            folder, nowhere = self.path.absolute(), {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self.drawing = start_beside("-m", "tools.plot", folder, "--out", folder / "curve.png", *flags, **nowhere)

    def check_saved(self):
        """Raise UserError where what the run became is not all on the disk."""
        if self.log and not self.path.is_dir():
            raise UserError(f"{self.path}/ {checkpoints.GONE}")
        if self.log and (self.saved is False or not self.log.flush(sync=True)):
            raise UserError(
                f"the last checkpoint could not be saved, or not all of log.txt: make room in {self.path}/ and resume"
            )
