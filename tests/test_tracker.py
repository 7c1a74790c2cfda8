"""Trackers get every number, once, also of a resumed run; a broken one changes nothing but a line."""

import json
import os
import sys

import pytest
from support import losses

from lib import config as knobs
from lib.console import UserError
from train_gpt2 import main

WANDB = """
import json, os
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
    """A function that puts a package of this name and source in front of the installed ones."""

    def put(name, source):
        (tmp_path / "packages").mkdir(exist_ok=True)
        (tmp_path / "packages" / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path / "packages")
        monkeypatch.setitem(sys.modules, name, None)  # so that it is there no more afterwards
        del sys.modules[name]
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
    events = EventAccumulator(str(tmp_path / "log" / "tensorboard" / "log"))  # the run is called as its log_dir
    events.Reload()
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    others = ["other/lr", "other/norm", "other/tokens_per_second"]  # a CPU has no MFU
    assert sorted(found) == ["loss/train_loss", "loss/val_loss", *others]  # losses come first
    found = {name.partition("/")[2]: values for name, values in found.items()}
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


@pytest.mark.parametrize(
    "source",
    [
        "raise OSError('broken')",
        "def init(**settings): raise OSError('broken')",
        WANDB.replace("self.write(log=numbers)", "1 / 0"),
    ],
)
def test_a_tracker_that_fails_is_said_once(tiny, package, capfd, source):
    package("wandb", source)
    metrics = main(tiny(tracker="wandb"))
    assert metrics["step"] == 20 and metrics["val_loss"] < 6
    assert capfd.readouterr().out.count("warning") == 1
