"""The life of a run: its folder, log, checkpoints, signals, tracker and summary."""

from lib.run.folder import RunFolder
from lib.run.run import Run, seed_step
from lib.run.signals import one_run

__all__ = ["Run", "RunFolder", "one_run", "seed_step"]
