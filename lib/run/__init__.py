"""The life of a run: its folder, log, checkpoints, signals, tracker, and what is said of it."""

from lib.run.folder import RunFolder
from lib.run.log import time_text
from lib.run.run import Run
from lib.run.signals import handlers_restored

__all__ = ["Run", "RunFolder", "handlers_restored", "time_text"]
