import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # two of pytest's workers share two cores, and OpenMP threads spin
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, as a run then does

import pytest
from support import TINY, write_shards

from train_gpt2 import TrainConfig


@pytest.fixture
def tiny(tmp_path):
    """A function that makes the TrainConfig of a tiny run on CPU; its shards are in tmp_path/data."""
    write_shards(tmp_path / "data", [1500, 5000, 3001, 7003])
    folders = {"data_dir": str(tmp_path / "data"), "log_dir": str(tmp_path / "log")}
    return lambda **overrides: TrainConfig(**{**TINY, **folders, **overrides})
