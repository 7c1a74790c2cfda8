"""The promises of an exact resume, each by a real crash, signal or damaged file."""

import os
import pickle
import re
import signal
import subprocess
import time

import pytest
import torch
from support import (
    PROBES,
    assert_same,
    assert_same_run,
    at_step,
    crash,
    finish,
    flags_of,
    losses,
    ranks_of,
    read_log,
    read_until,
    run_warm,
    start,
    terminate,
    write_shards,
)

import train_gpt2
from lib.checkpoint import load_checkpoint, newest_whole_checkpoint, save_checkpoint
from lib.console import Stopped, UserError
from lib.optimizers import load_optimizer
from train_gpt2 import main

LONG = dict(max_steps=1_000_000, val_every=50, checkpoint_every=20)


def test_a_stopped_run_continues_bit_for_bit(tiny, tmp_path, monkeypatch):
    config = dict(max_steps=41, checkpoint_every=5)  # the shards hold 29 steps an epoch, and rows cross shards
    main(tiny(log_dir=str(tmp_path / "whole"), **config))
    for stop, step in ((crash, 0), (crash, 28), (crash, 40), (terminate, 0), (terminate, 40)):
        folder = tmp_path / f"{stop.__name__}_{step}"
        with monkeypatch.context() as patch, pytest.raises((MemoryError, Stopped)):
            at_step(patch, {step}, stop)
            main(tiny(log_dir=str(folder), **config))
        main(tiny(log_dir=str(folder), init_from="resume", **config))
        assert_same_run(tmp_path / "whole", folder, 41)


def test_resuming_with_other_ranks_and_micro_batches_keeps_the_losses(tiny, tmp_path, monkeypatch):
    config = dict(max_steps=60, val_every=20)
    main(tiny(log_dir=str(tmp_path / "whole"), micro_batch_size=16, **config))
    at_step(monkeypatch, {19}, terminate)
    with pytest.raises(Stopped):
        main(tiny(log_dir=str(tmp_path / "log"), micro_batch_size=4, **config))
    result = run_warm("train_gpt2.py", *flags_of(tiny(init_from="resume", micro_batch_size=2, **config)), ranks=2)
    assert result.returncode == 0 and "resuming at step 20" in result.stdout, result.stdout
    for kind, count in (("train", 60), ("val", 4)):
        whole, log = (losses(tmp_path / d, kind) for d in ("whole", "log"))
        assert len(whole) == count and log == pytest.approx(whole, abs=5e-5 if kind == "train" else 1.01e-4)


def test_resume_without_a_checkpoint_begins_at_step_0(tiny, tmp_path, capsys):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.txt").write_text("0 val 6.0000\n0 train 6.2")  # killed before the first checkpoint
    main(tiny(init_from="resume"))
    assert "no checkpoint in" in capsys.readouterr().out
    main(tiny(log_dir=str(tmp_path / "fresh")))
    assert read_log(tmp_path / "log") == read_log(tmp_path / "fresh")


def damage_by(kind):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 4
        path.write_bytes(content if kind == "flipped" else content[: len(content) // 2])

    return damage


@pytest.mark.parametrize("kind", ["truncated", "flipped"])
def test_damaged_checkpoints_are_named_and_the_run_falls_back(kind, tiny, tmp_path, capsys):
    main(tiny(checkpoint_every=5))
    whole = read_log(tmp_path / "log")
    damage = damage_by(kind)
    damage(tmp_path / "log" / "model_00020.pt")
    capsys.readouterr()
    main(tiny(checkpoint_every=5, init_from="resume"))
    out = capsys.readouterr().out
    reason = "is damaged" if kind == "flipped" else "is truncated, or was not written by this trainer"
    assert f"model_00020.pt {reason}" in out and "resuming at step 15" in out
    assert read_log(tmp_path / "log") == whole
    for path in (tmp_path / "log").glob("*.pt"):
        damage(path)
    with pytest.raises(UserError, match="none of the 3 checkpoints"):
        main(tiny(checkpoint_every=5, init_from="resume"))
    assert read_log(tmp_path / "log") == whole


def test_a_malicious_pickle_executes_nothing(tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    with pytest.raises(UserError, match="model is of type .*Bomb"):
        save_checkpoint(tmp_path, {"model": Bomb(), "step": 1}, keep=2)
    monkeypatch.setattr("lib.checkpoint.check_plain", lambda value, name: None)
    assert save_checkpoint(tmp_path, {"model": Bomb(), "step": 1}, keep=2)  # with the right sha256
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("model_00001.pt", "plain.pt"):
        with pytest.raises(UserError):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_a_resume_that_cannot_be_exact_is_refused(tiny, tmp_path, capsys):
    main(tiny())
    before = read_log(tmp_path / "log")
    for change in ({"n_layer": 1}, {"total_batch_size": 1024}, {"sequence_length": 64}, {"seed": 2}):
        (name,) = change
        with pytest.raises(UserError, match=f"cannot resume: {name} was"):
            main(tiny(init_from="resume", **change))
    write_shards(tmp_path / "other", [1500, 5000, 3001, 7004])
    with pytest.raises(
        UserError, match="tiny_train_000003.npy is not the shard that the run began with .*7003, None.* now .7004"
    ):
        main(tiny(init_from="resume", data_dir=str(tmp_path / "other")))
    assert read_log(tmp_path / "log") == before
    capsys.readouterr()
    main(tiny(init_from="resume", max_steps=25, max_lr=1e-3))
    assert "resuming at step 20, max_steps 20 -> 25, max_lr 0.01 -> 0.001" in capsys.readouterr().out


def test_a_signal_ends_the_run_with_a_checkpoint_of_all_ranks(tiny, tmp_path):
    process = start(tiny(**LONG), ranks=2, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="60")
    read_until(process, r"step +33/")
    for pid in (*ranks_of(process), process.pid):
        os.kill(pid, signal.SIGTERM)
    output = finish(process)
    assert re.search("stopped by a signal. To resume, .*--init_from resume", output), output
    saved = int(re.findall(r"saved .*/model_(\d+).pt", output)[-1])
    assert saved >= 34 and load_checkpoint(tmp_path / "log" / f"model_{saved:05d}.pt")["step"] == saved
    assert read_log(tmp_path / "log").splitlines()[-1].startswith(f"{saved - 1} norm")


def test_a_signal_during_evaluation_does_not_wait_for_its_end(tiny, tmp_path, monkeypatch):
    next_batch, read = train_gpt2.DataLoaderLite.next_batch, []

    def signalled(self):
        read.append(self.split)
        if len(read) == 3:
            terminate()
        return next_batch(self)

    monkeypatch.setattr(train_gpt2.DataLoaderLite, "next_batch", signalled)
    with pytest.raises(Stopped):
        main(tiny())
    assert read == ["val"] * 3 and (tmp_path / "log" / "model_00000.pt").exists()  # of 8


def test_a_second_signal_ends_it_at_once(tiny, tmp_path):
    process = start(tiny(), script=PROBES / "endless_step.py")
    read_until(process, "in the step")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # the same one, passed on by a scheduler
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM


def test_a_hung_rank_ends_the_job_after_the_timeout(tiny):
    process = start(tiny(collective_timeout=3, **LONG), ranks=2)
    read_until(process, r"step +5/")
    hung = ranks_of(process)[1]
    os.kill(hung, signal.SIGSTOP)
    begin = time.monotonic()
    read_until(process, "Timed out")
    os.kill(hung, signal.SIGKILL)  # torchrun would do it, after half a minute
    finish(process)
    assert process.returncode == 1 and time.monotonic() - begin < 100


def test_torchrun_restarts_resume_by_themselves(tiny, tmp_path):
    main(tiny(log_dir=str(tmp_path / "whole"), micro_batch_size=4, max_steps=40))
    process = start(tiny(max_steps=40, collective_timeout=20), ranks=2, restarts=3, script=PROBES / "dies_once.py")
    output = finish(process)
    assert process.returncode == 0 and "resuming at step 20" in output and "terminate called" not in output, output
    whole, log = (losses(tmp_path / d, "train") for d in ("whole", "log"))
    assert len(log) == 40 and log == pytest.approx(whole, abs=1e-5)


def test_one_writer_a_log_dir(tiny, tmp_path):
    process = start(tiny(**LONG))
    read_until(process, r"step +5/")
    with pytest.raises(UserError, match=f"is being written by process {process.pid} on"):
        main(tiny(init_from="resume", **LONG))
    process.send_signal(signal.SIGTERM)
    finish(process)
    steps = len(losses(tmp_path / "log", "train"))
    with pytest.raises(UserError, match=f"the run is at step {steps}, beyond max_steps 1"):  # free again
        main(tiny(init_from="resume", **{**LONG, "max_steps": 1}))


def test_workers_without_their_torchrun_stop_and_free_the_log_dir(tiny, tmp_path):
    process = start(tiny(**LONG), ranks=2)
    read_until(process, r"step +5/")
    os.kill(process.pid, signal.SIGKILL)
    output = process.stdout.read()  # ends when the orphans do
    assert "stopped by a signal" in output
    steps = len(losses(tmp_path / "log", "train"))
    assert main(tiny(init_from="resume", **{**LONG, "max_steps": steps + 1}))["step"] == steps + 1


def poison(monkeypatch, steps):
    """NaN losses in these optimizer steps."""
    forward, get_lr, now = train_gpt2.GPT.forward, train_gpt2.get_lr, [-1]

    def poisoned(self, idx, targets=None, return_logits=True):
        logits, loss = forward(self, idx, targets, return_logits)
        return logits, loss * float("nan") if self.training and now[0] in steps else loss

    def get_lr_at(step, config):
        now[0] = step
        return get_lr(step, config)

    monkeypatch.setattr(train_gpt2, "get_lr", get_lr_at)
    monkeypatch.setattr(train_gpt2.GPT, "forward", poisoned)


def test_a_non_finite_step_is_skipped_whole(tiny, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {9})
    main(tiny(max_steps=10, checkpoint_every=1))
    before, after = (load_checkpoint(tmp_path / "log" / f"model_{step:05d}.pt") for step in (9, 10))
    assert_same(before["model"], after["model"])
    assert_same(before["optimizer"]["state"], after["optimizer"]["state"])
    assert after["nonfinite"] == 1 and "9 train nan" in read_log(tmp_path / "log")
    assert capsys.readouterr().out.count("UPDATE SKIPPED") == 1


def test_scattered_non_finite_steps_do_not_stop_the_run(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3, 6, 7, 11, 12})
    assert main(tiny(max_nonfinite=3))["step"] == 20
    assert losses(tmp_path / "log", "val")[20] < 5.5


def test_many_non_finite_steps_in_a_row_stop_and_a_resume_begins_before_them(tiny, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        poison(patch, set(range(12, 99)))
        with pytest.raises(UserError, match=r"NaN or infinite in steps 12-16.*from .*model_00010.pt"):
            main(tiny(checkpoint_every=2))
    main(tiny(checkpoint_every=2, init_from="resume", max_lr=1e-3))
    assert "resuming at step 10, max_lr 0.01 -> 0.001" in capsys.readouterr().out
    assert losses(tmp_path / "log", "val")[20] < 5.5


@pytest.mark.parametrize("every", [1, 100])
def test_weights_that_an_update_blew_up_are_not_resumed_from(every, tiny, tmp_path, capsys):
    """A learning rate that ruins the weights in one step: they are finite, their loss is not."""
    main(tiny(max_steps=4, checkpoint_every=1))
    flags = dict(checkpoint_every=every, init_from="resume", warmup_steps=0, keep_checkpoints=2)
    with pytest.raises(UserError, match="from .*model_00004.pt"):
        main(tiny(**flags, max_lr=1e29))
    assert (tmp_path / "log" / "model_00005.pt.not_finite").exists() == (every == 1)
    main(tiny(**flags))
    assert "resuming at step 4, " in capsys.readouterr().out and losses(tmp_path / "log", "val")[20] < 5.5


def test_gradients_that_no_scale_makes_finite_stop_a_float16_run(tiny, monkeypatch):
    forward = train_gpt2.GPT.forward

    def poisoned(self, idx, targets=None, return_logits=True):
        logits, loss = forward(self, idx, targets, return_logits)
        zero = (self.transformer.wpe.weight * 0).sum().sqrt()  # with a gradient of NaN
        return logits, loss + zero if self.training else loss

    monkeypatch.setattr(train_gpt2.GPT, "forward", poisoned)
    with pytest.raises(UserError, match="NaN or infinite in steps 16-20"):
        main(tiny(dtype="float16", max_steps=30))


def test_a_full_disk_keeps_the_old_checkpoints_and_the_run(tiny, tmp_path, monkeypatch, capsys):
    original = torch.save

    def save(contents, file):
        if contents["step"] == 10:
            file.write(b"a part of it")
            raise OSError(28, "No space left on device")
        original(contents, file)

    monkeypatch.setattr(torch, "save", save)
    main(tiny(checkpoint_every=5))
    assert "model_00010.pt COULD NOT BE SAVED" in capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "log").iterdir())
    assert names == [
        "config.json",
        "lock",
        "log.txt",
        "model_00005.pt",
        "model_00015.pt",
        "model_00020.pt",
        "summary.md",
    ]


def test_a_full_disk_at_the_end_exits_non_zero(tiny, tmp_path):
    process = start(tiny(), script=PROBES / "limited_files.py")
    output = finish(process)
    assert process.returncode == 2, output
    assert output.count("COULD NOT BE SAVED") == 2 and "error: the last checkpoint could not be saved" in output
    assert sorted(p.name for p in (tmp_path / "log").iterdir()) == ["config.json", "lock", "log.txt"]


def test_stale_temporaries_are_cleared_and_old_checkpoints_go_last(tiny, tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "model_00005.pt.host.0123456789abcdef.tmp").write_bytes(b"half")
    main(tiny(checkpoint_every=4, keep_checkpoints=2))
    names = sorted(p.name for p in (tmp_path / "log").iterdir())
    assert names == ["config.json", "lock", "log.txt", "model_00016.pt", "model_00020.pt", "summary.md"]


def test_steps_of_six_digits_come_after_those_of_five(tmp_path):
    empty = {"model": {}, "optimizer": {}, "config": {}, "train_config": {}}
    for step in (9, 99_999, 100_000):
        assert save_checkpoint(tmp_path, {**empty, "step": step}, keep=2)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["model_100000.pt", "model_99999.pt"]
    assert newest_whole_checkpoint(tmp_path)[0].name == "model_100000.pt"


def test_moments_of_another_kind_of_device_go_where_the_fused_kernel_needs_them():
    model = torch.nn.Linear(2, 2)
    old = torch.optim.AdamW(
        model.parameters(), fused=False
    )  # as on an Apple GPU: the step of a moment stays on the CPU
    model(torch.ones(1, 2)).sum().backward()
    old.step()
    new = torch.optim.AdamW(torch.nn.Linear(2, 2, device="meta").parameters())
    new.param_groups[0]["fused"] = True
    load_optimizer(new, old.state_dict(), trained=True)
    assert {moment.device.type for state in new.state.values() for moment in state.values()} == {"meta"}
    assert new.param_groups[0]["fused"] is True
