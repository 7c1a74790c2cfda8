"""Trackers get every number, once, also of a resumed run; a slow, broken or killed one changes nothing but a line."""

import json
import os
import subprocess
import sys
import time

import pytest
from support import PROBES, ROOT, losses, run

from lib import config as knobs
from lib.console import UserError
from lib.run import tracker
from train_gpt2 import main

WANDB = """
import json, os
assert os.path.samefile("/dev/stdin", os.devnull)  # no program that wandb starts can hold the pipe
def init(**settings):
    run = Run()
    run.write(init={k: str(v) if k == "dir" else v for k, v in settings.items()})
    return run
class Run:
    def write(self, **record):
        with open(os.environ["FAKE_WANDB"], "a") as file:
            file.write(json.dumps(record) + "\\n")
    def log(self, numbers):
        self.write(log=numbers)
    def define_metric(self, name, step_metric):
        self.write(metric=[name, step_metric])
    def finish(self):
        self.write(finish=True)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that puts a package of this name and source in front of the installed ones, here and beside."""

    def put(name, source):
        (tmp_path / "packages").mkdir(exist_ok=True)
        (tmp_path / "packages" / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path / "packages")
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'packages'}{os.pathsep}{ROOT}")
        monkeypatch.setenv("FAKE_WANDB", str(tmp_path / "wandb.jsonl"))
        return lambda: [json.loads(line) for line in (tmp_path / "wandb.jsonl").read_text().splitlines()]

    return put


def interrupted(tiny, **overrides):
    """A run that is killed after its step 14 and resumed from its checkpoint of step 10, up to step 20."""
    main(tiny(max_steps=15, **overrides))
    (path,) = (path for path in os.scandir(tiny().log_dir) if path.name == "model_00015.pt")
    os.unlink(path)
    main(tiny(max_steps=20, init_from="resume", **overrides))


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted(tiny, tracker="tensorboard")
    events = EventAccumulator(str(tmp_path / "log" / "tensorboard"))
    events.Reload()
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert set(found) == {"train_loss", "val_loss", "lr", "norm", "tokens_per_second"}  # a CPU has no MFU
    assert [step for step, _ in found["lr"]] == list(range(20))
    for kind in ("train", "val"):
        expected = losses(tmp_path / "log", kind)
        assert [step for step, _ in found[f"{kind}_loss"]] == sorted(expected)
        assert dict(found[f"{kind}_loss"]) == pytest.approx(expected, abs=1e-4)


def test_wandb_continues_the_run_that_a_folder_began(tiny, tmp_path, package):
    read = package("wandb", WANDB)
    interrupted(tiny, tracker="wandb")
    records = read()
    first, second = (record["init"] for record in records if "init" in record)
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["config"]["n_layer"] == 2
    assert records.count({"metric": ["*", "step"]}) == records.count({"finish": True}) == 2
    losses_ = {r["log"]["step"]: r["log"]["train_loss"] for r in records if "train_loss" in r.get("log", {})}
    assert losses_ == pytest.approx(losses(tmp_path / "log", "train"), abs=1e-6)
    main(tiny(max_steps=1, tracker="wandb", log_dir=str(tmp_path / "other")))
    assert [record["init"]["id"] for record in read() if "init" in record][2] != first["id"]


def test_the_real_wandb_takes_the_numbers_offline(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    main(tiny(max_steps=2, tracker="wandb"))
    (file,) = (tmp_path / "log" / "wandb").glob("offline-run-*/*.wandb")
    for name in ("train_loss", "val_loss", "tokens_per_second", "micro_batch_size"):
        assert name.encode() in file.read_bytes()


def test_a_package_that_is_not_installed_is_refused_before_anything_is_made(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(knobs, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        main(tiny(tracker="wandb"))
    with pytest.raises(UserError, match="one of empty tensorboard wandb"):
        main(tiny(tracker="mlflow"))
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("source", ["raise OSError('broken')", "def init(**settings): raise OSError('broken')"])
def test_a_tracker_that_fails_is_said_once(tiny, package, capfd, source):
    package("wandb", source)
    metrics = main(tiny(tracker="wandb"))
    assert metrics["step"] == 20 and metrics["val_loss"] < 6
    assert capfd.readouterr().out.count("warning") == 1


def test_a_tracker_that_stands_still_costs_no_time_and_is_said_once(tmp_path, monkeypatch, capfd):
    asleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(tracker, "start_beside", lambda *command, **streams: subprocess.Popen(asleep, **streams))
    monkeypatch.setattr(tracker, "PATIENCE", 0.1)
    it = tracker.Tracker("wandb")
    it.start(tmp_path, 0, {"n_layer": 2})
    start = time.perf_counter()
    for step in range(5000):
        it.send(step, {"train_loss": 3.123456, "lr": 6e-4, "norm": 0.5, "tokens_per_second": 500_000.0, "mfu": 0.447})
    assert time.perf_counter() - start < 20
    it.close()
    it.process.kill()
    it.process.wait()
    assert capfd.readouterr().out.count("wandb cannot keep up") == 1


def test_a_tracker_that_is_killed_is_said_once(tmp_path, package, capfd):
    read = package("wandb", WANDB)
    it = tracker.Tracker("wandb")
    it.start(tmp_path, 0, {})
    while not (tmp_path / "wandb.jsonl").exists() or len(read()) < 2:
        assert it.process.poll() is None
    it.process.kill()
    it.process.wait()
    for step in range(3):
        it.send(step, {"train_loss": 3.0})
    it.close()
    assert capfd.readouterr().out.count("has ended") == 1


def test_the_tracker_ends_with_a_run_that_is_killed(tmp_path, package):
    read = package("wandb", WANDB)
    env = {"PYTHONPATH": os.environ["PYTHONPATH"]}
    run(PROBES / "killed_with_tracker.py", tmp_path, env=env)  # the tracker holds its end of the pipe until it ends
    assert read()[-2:] == [{"log": {"step": 0, "train_loss": 3.0}}, {"finish": True}]
