import contextlib
import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # two of pytest's workers share two cores, and OpenMP threads spin
os.environ["MKL_NUM_THREADS"] = "1"  # where it is set, it comes before the other
os.environ["no_proxy"] = "127.0.0.1"  # of the servers among the tests
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, as a run then does

import psutil
import pytest
from support import TINY, write_shards

from train_gpt2 import TrainConfig

signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a script starts with &, as SIGQUIT is
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
for name in list(os.environ):  # of a job that the tests are started in
    if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") or name.startswith(("TORCHELASTIC_", "HF_", "TRANSFORMERS_")):
        del os.environ[name]


QUICK = ("test_edits.py", "test_hellaswag.py", "test_model.py", "test_sample.py", "test_tokenizer.py", "test_train.py")


def pytest_collection_modifyitems(items):
    """python -m pytest -m quick: what a changed line of the lesson may break."""
    for item in items:
        slow = any(word in item.name for word in ("compile", "ranks", "ddp", "sharded", "fine_tuning", "hub"))
        if item.path.name in QUICK and not slow and not item.get_closest_marker("by_hand"):
            item.add_marker("quick")


@pytest.fixture
def tiny(tmp_path):
    """A function that makes the TrainConfig of a tiny run on CPU; its shards are in tmp_path/data."""
    write_shards(tmp_path / "data", [1500, 5000, 3001, 7003])
    folders = {"data_dir": str(tmp_path / "data"), "log_dir": str(tmp_path / "log")}
    return lambda **overrides: TrainConfig(**{**TINY, **folders, **overrides})


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """On a busy machine, matplotlib, which leaves the CPU to everything else, may take long."""
    monkeypatch.setattr("lib.run.run.PATIENCE", 100)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """A test that fails leaves no run on the CPU, which would slow down the tests after it."""
    yield
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if not any("multiprocessing" in word for word in child.cmdline()):  # the servers of run_warm stay
                for process in [child, *child.children(recursive=True)]:
                    process.kill()
