"""The life of a run: its folder, log, checkpoints, signals, tracker and summary."""

from lib.run.code import script_of
from lib.run.folder import RunFolder
from lib.run.log import time_text
from lib.run.run import Run
from lib.run.seed import step_seed
from lib.run.signals import one_run

__all__ = ["Run", "RunFolder", "one_run", "script_of", "step_seed", "time_text"]
