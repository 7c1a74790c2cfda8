"""What disks, consoles, files and people do to a run: it ends well, or with a message, and goes on bit for bit."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    PROBES,
    TINY,
    assert_same,
    assert_same_run,
    at_step,
    command_of,
    crash,
    disk,
    environment,
    flags_of,
    losses,
    ranks_of,
    read_log,
    read_until,
    run_warm,
    start,
    write_items,
    write_shards,
)

import hellaswag
import train_gpt2
from lib.checkpoint import load_checkpoint, newest_whole_checkpoint, write_checkpoint
from lib.console import UserError, run_as_command
from lib.data import shards
from lib.files import hash_file
from train_gpt2 import TrainConfig, main, parse_args

SMALL = dict(n_layer=1, total_batch_size=128, micro_batch_size=4, max_steps=12, checkpoint_every=4, val_every=4,
             val_tokens=100, max_lr=1e-3)  # fmt: skip
LONG = dict(max_steps=1_000_000, checkpoint_every=0)


@pytest.fixture
def small(tiny):
    """The TrainConfig of a run of 12 steps in 0.1 s."""
    return lambda **overrides: tiny(**{**SMALL, **overrides})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The log_dir of that run when nothing happens to it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_shards(folder / "data", [1500, 5000, 3001, 7003])
    torch.set_num_threads(1)
    main(TrainConfig(**{**TINY, **SMALL, "data_dir": str(folder / "data"), "log_dir": str(folder / "log")}))
    return folder / "log"


@pytest.fixture
def log_dir(tmp_path):
    return tmp_path / "log"


def fill(folder):
    """Fill a disk to the last byte."""
    with open(folder / "filler", "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def free(folder):
    (folder / "filler").unlink()


def ends_with(message, config, capsys=None):
    """The run ends as a program with exit code 2 and this one error message; returns what it said."""
    with pytest.raises(SystemExit) as exit:
        run_as_command(main, config)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and re.search(message, err) and err.startswith("error: "), out + err
    return out


# -----------------------------------------------------------------------------
# Names of other people


def test_files_of_other_people_are_neither_taken_nor_removed(small, log_dir, undisturbed, monkeypatch, capsys):
    names = ["model_00005_backup1.pt", "model_best.pt", "model_5.pt", "model_00099.pt.tmp", "notes.txt.12.tmp", "x.tmp"]
    log_dir.mkdir()
    for name in names:
        (log_dir / name).write_text("of other people")
    at_step(monkeypatch, {9}, crash)
    with pytest.raises(MemoryError):
        main(small(checkpoint_every=2, keep_checkpoints=2))
    monkeypatch.undo()
    main(small(checkpoint_every=2, keep_checkpoints=2, init_from="resume"))
    assert "resuming at step 8" in capsys.readouterr().out
    assert_same_run(undisturbed, log_dir, 12)
    assert all((log_dir / name).read_text() == "of other people" for name in names)
    found = {path.name for path in log_dir.iterdir()} - {*names, "config.json", "log_dropped.txt", "summary.md"}
    assert found == {"lock", "log.txt", "model_00010.pt", "model_00012.pt"}


def test_temporary_files_of_other_people_survive_in_the_working_directory(small, tmp_path, undisturbed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = [tmp_path / name for name in ("thesis.txt.1234.tmp", "data.json.77.tmp", "a.tmp", "model.pt.3.tmp")]
    ours = [tmp_path / name for name in ("model_00004.pt.h.0123456789abcdef.tmp", "log.txt.h.00000000000000ff.tmp")]
    for path in theirs + ours:
        path.write_text("half")
    main(small(log_dir="."))
    assert all(path.exists() for path in theirs) and not any(path.exists() for path in ours)
    assert_same_run(undisturbed, tmp_path, 12)


def test_a_folder_named_like_a_checkpoint_ends_no_run(small, log_dir, undisturbed, monkeypatch, capsys):
    def make_folders():
        (log_dir / "model_00001.pt").mkdir()
        (log_dir / "model_99999.pt").mkdir()

    at_step(monkeypatch, {5}, make_folders)
    main(small(checkpoint_every=2, keep_checkpoints=2))
    monkeypatch.undo()
    main(small(checkpoint_every=2, keep_checkpoints=2, init_from="resume"))
    assert "resuming at step 12" in capsys.readouterr().out
    assert_same_run(undisturbed, log_dir, 12)
    assert sum(path.is_file() for path in log_dir.glob("*.pt")) == 2


def test_a_run_that_ends_between_the_first_look_and_the_lock_is_found(small, log_dir, undisturbed, monkeypatch):
    open_shards = train_gpt2.open_shards

    def open_late(*args):  # another process, as it were
        monkeypatch.undo()
        shutil.copytree(undisturbed, log_dir)
        return open_shards(*args)

    monkeypatch.setattr(train_gpt2, "open_shards", open_late)
    with pytest.raises(UserError, match="holds a run"):
        main(small(seed=7))
    before = read_log(log_dir)
    main(small(init_from="resume"))
    assert read_log(log_dir) == before


# -----------------------------------------------------------------------------
# The console


def test_a_dead_reader_ends_no_run(small, log_dir, undisturbed):
    process = start(small())
    read_until(process, r"step +0/")
    process.stdout.close()  # as head -5 does, or a tee that was killed
    assert process.wait(timeout=120) == 0
    assert_same_run(undisturbed, log_dir, 12)


def test_a_dead_reader_ends_no_rank_and_a_signal_no_torchrun(small, log_dir):
    command = command_of("train_gpt2.py", *flags_of(small(**LONG, micro_batch_size=2)), ranks=2)
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    read_until(process, r"step +2/")
    process.stdout.close()
    workers, seen = ranks_of(process), len(read_log(log_dir))
    deadline = time.monotonic() + 120
    while len(read_log(log_dir)) < seen + 200 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(workers[1], signal.SIGTERM)
    assert process.wait(timeout=120) == 0  # so that torchrun does not restart them
    step = int(read_log(log_dir).splitlines()[-1].split()[0]) + 1
    assert load_checkpoint(log_dir / f"model_{step:05d}.pt")["step"] == step


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_console_without_utf8_and_a_hangup_under_nohup_end_no_run(small, tmp_path):
    """PYTHONIOENCODING=ascii nohup python train_gpt2.py --log_dir é > /dev/full"""
    config = small(log_dir=str(tmp_path / "é"), **LONG)
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            command_of("train_gpt2.py", *flags_of(config)), env=environment(PYTHONIOENCODING="ascii"), stdout=full,
            stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        )  # fmt: skip
    log = tmp_path / "é" / "log.txt"
    deadline = time.monotonic() + 120
    for number in (signal.SIGHUP, signal.SIGINT):  # the first one is ignored
        seen = log.stat().st_size if log.exists() else 0
        while not (log.exists() and log.stat().st_size > seen + 200) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert (
        process.returncode == -signal.SIGINT and err.startswith(b"stopping after this step") and err.count(b"\n") == 1
    )
    assert newest_whole_checkpoint(log.parent)[0]


def test_text_that_the_terminal_cannot_print_is_escaped(small, tmp_path, monkeypatch):
    for encoding in ("ascii", "latin-1", "cp1252"):
        path = tmp_path / f"terminal {encoding}"
        with open(path, "w", encoding=encoding) as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            patch.setattr(train_gpt2, "sample", lambda *args: ["wörld 世界"])
            main(small(log_dir=str(tmp_path / f"é世{encoding}"), max_steps=1, vocab_size=50304, sample_every=1))
        text = path.read_text(encoding=encoding)
        assert "\\u4e16" in text and text.splitlines()[-1].startswith("next: ")


def test_a_run_without_any_console_ends_well(small, log_dir, undisturbed, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # python train_gpt2.py >&-
    main(small())
    assert_same_run(undisturbed, log_dir, 12)


# -----------------------------------------------------------------------------
# Disks


def test_records_wait_for_a_disk_that_takes_a_part_of_them(small, log_dir, undisturbed, monkeypatch, capsys):
    """A limit on the size of files that cuts a record in two, and is lifted two steps after a checkpoint was due."""
    limit, seen = resource.getrlimit(resource.RLIMIT_FSIZE), []

    def act():
        size = (log_dir / "log.txt").stat().st_size
        seen.append(read_log(log_dir))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 7, limit[1]) if len(seen) == 1 else limit)

    at_step(monkeypatch, {2, 6}, act)
    try:
        main(small())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    out = capsys.readouterr().out
    assert seen[0] == seen[1] and out.count("CANNOT BE WRITTEN, its records wait") == 1
    assert "model_00004.pt COULD NOT BE SAVED" in out
    assert_same_run(undisturbed, log_dir, 12)


def test_a_log_that_another_program_moves_replaces_or_truncates_is_noticed(small, log_dir, monkeypatch, capsys):
    log, held = log_dir / "log.txt", []
    actions = {
        2: lambda: log.rename(log_dir / "log.txt.1"),  # as logrotate does
        4: lambda: log.unlink(),
        6: lambda: (log_dir / "new").write_text("0 note 1\n") and os.replace(log_dir / "new", log),  # as sed -i
        8: lambda: os.truncate(log, 0),  # as logrotate with copytruncate
    }
    for step, action in actions.items():
        at_step(monkeypatch, {step}, lambda action=action: held.append(read_log(log_dir)) or action())
    main(small())
    steps = [sorted({int(line.split()[0]) for line in text.splitlines()}) for text in held]
    assert steps == [[0, 1], [2, 3, 4], [4, 5], [0, 6, 7, 8]]  # the validations of 4 and 8 were before the move
    out = capsys.readouterr().out
    assert out.count("was moved, removed or replaced: writing a new one") == 3 and out.count("was truncated") == 1
    assert min(losses(log_dir, "train")) == 8 and max(losses(log_dir, "train")) == 11
    assert "0 train" in (log_dir / "log.txt.1").read_text()


def test_a_disk_that_is_full_for_a_while_changes_nothing(small, log_dir, undisturbed, monkeypatch, capsys):
    with disk(log_dir, "2m"):
        at_step(monkeypatch, {5, 10}, lambda: (free if (log_dir / "filler").exists() else fill)(log_dir))
        main(small())
        out = capsys.readouterr().out
        assert re.search(r"model_00008.pt COULD NOT BE SAVED.*: \[Errno 28\] No space left on device", out)
        assert "was truncated" not in out
        assert "Output in" in out and "next: python" in out
        assert_same_run(undisturbed, log_dir, 12)


def test_a_disk_that_stays_full_is_an_error_and_the_rerun_is_exact(small, log_dir, undisturbed, monkeypatch, capsys):
    for step in (0, 5):  # before the first record, after the first checkpoint
        with disk(log_dir, "1m"):
            at_step(monkeypatch, {step}, lambda: fill(log_dir))
            out = ends_with("could not be saved.*make room in .* and resume", small(val_every=0), capsys)
            monkeypatch.undo()
            assert "Output in" not in out and "next:" not in out and "No space left on device" in out
            assert ("log.txt lacks its last records, from step 0 on" in out) == (step == 0)
            ends_with("could not be saved|cannot rewrite .*No space", small(val_every=0, init_from="resume"), capsys)
            free(log_dir)
            main(small(val_every=0, init_from="resume"))
            assert f"resuming at step {4}" in capsys.readouterr().out or step == 0
            train = [line for line in read_log(undisturbed).splitlines() if "val" not in line]
            assert read_log(log_dir).splitlines() == train
            a, b = (load_checkpoint(folder / "model_00012.pt") for folder in (undisturbed, log_dir))
            assert_same(a["model"], b["model"])


@pytest.mark.parametrize("keep", [2, 3])
def test_a_disk_with_room_for_just_the_checkpoints_takes_all(keep, small, log_dir, undisturbed, capsys):
    size = (undisturbed / "model_00012.pt").stat().st_size
    with disk(log_dir, int(size * (keep + 0.3))):
        main(small(checkpoint_every=1, keep_checkpoints=keep))
        out = capsys.readouterr().out
        assert out.count("| saved") == 12 and "COULD NOT" not in out
        assert_same_run(undisturbed, log_dir, 12)


def test_making_room_never_takes_the_checkpoints_from_before_a_divergence(small, log_dir, undisturbed, monkeypatch):
    size = (undisturbed / "model_00012.pt").stat().st_size
    with disk(log_dir, int(size * 2.3)):
        forward, now = train_gpt2.GPT.forward, []

        def poisoned(self, idx, targets=None, return_logits=True):
            logits, loss = forward(self, idx, targets, return_logits)
            return logits, loss * math.nan if self.training and now else loss

        monkeypatch.setattr(train_gpt2.GPT, "forward", poisoned)
        at_step(monkeypatch, {6}, lambda: now.append(True))
        with pytest.raises(UserError, match="continues from .*model_0000[56].pt"):
            main(small(checkpoint_every=1, keep_checkpoints=2))
        monkeypatch.undo()
        for path in log_dir.glob("*.not_finite"):
            path.unlink()
        main(small(checkpoint_every=1, keep_checkpoints=2, init_from="resume"))
        assert_same_run(undisturbed, log_dir, 12)


def test_a_log_dir_that_cannot_be_written_is_refused(small, tmp_path, log_dir, undisturbed, capsys):
    log_dir.write_text("a file")
    for path in (log_dir, log_dir / "below"):
        ends_with("cannot (read|write) .*log.*choose another folder", small(log_dir=str(path)), capsys)
    log_dir.unlink()
    (log_dir / "lock").mkdir(parents=True)
    ends_with("cannot write .*log/.*Is a directory", small(), capsys)
    (log_dir / "lock").rmdir()
    with disk(log_dir, "1m", "ro"):
        ends_with("cannot write .*log/.*Read-only file system", small(), capsys)
    with disk(log_dir, "1m"):
        fill(log_dir)
        ends_with("cannot write .*log/.*No space left on device", small(), capsys)
    main(small())
    assert_same_run(undisturbed, log_dir, 12)


def test_a_disk_without_locks_is_said_and_used(small, log_dir, undisturbed, monkeypatch, capsys):
    for number in (errno.ENOSYS, errno.ENOTSUP):

        def flock(*args, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)
        shutil.rmtree(log_dir, ignore_errors=True)
        main(small())
        assert f"cannot be locked ([Errno {number}]" in capsys.readouterr().out
        assert_same_run(undisturbed, log_dir, 12)


# -----------------------------------------------------------------------------
# Folders and shards that change while it trains


@pytest.mark.parametrize("every", [0, 4])
@pytest.mark.parametrize("gone", ["moved", "deleted"])
def test_a_log_dir_that_goes_away_is_an_error(every, gone, small, tmp_path, log_dir, undisturbed, monkeypatch, capsys):
    config = dict(checkpoint_every=every)
    act = (lambda: log_dir.rename(tmp_path / "moved")) if gone == "moved" else (lambda: shutil.rmtree(log_dir))
    at_step(monkeypatch, {6}, act)
    out = ends_with("log/ no longer exists: start again, or restore it and resume", small(**config), capsys)
    assert "Output in" not in out
    monkeypatch.undo()
    if gone == "moved":
        (tmp_path / "moved").rename(log_dir)
    main(small(init_from="resume" if gone == "moved" else "scratch"))
    assert ("resuming at step 4" in capsys.readouterr().out) == (gone == "moved" and every == 4)
    assert_same_run(undisturbed, log_dir, 12)


@pytest.mark.parametrize("fault", ["moved", "deleted", "truncated", "cut within a token"])
def test_shards_that_go_away_are_named_and_the_resume_is_exact(
    fault, small, tmp_path, log_dir, undisturbed, monkeypatch, capsys
):
    data, copy = tmp_path / "data", tmp_path / "copy"
    shutil.copytree(data, copy)

    def act():
        shards.OpenFile.cache_clear()  # as where there are more shards than a process has open
        if fault == "moved":
            data.rename(tmp_path / "elsewhere")
        elif fault == "deleted":
            shutil.rmtree(data)
        else:
            for path in data.glob("*train*"):
                os.truncate(path, 500 if fault == "truncated" else 501)

    at_step(monkeypatch, {6}, act)
    ends_with(r"data/tiny_train_00000\d.npy.*[Rr]estore it.* and resume", small(), capsys)
    monkeypatch.undo()
    ends_with("no .*train.* shards in|is not a complete token shard", small(init_from="resume"), capsys)
    shutil.rmtree(data, ignore_errors=True)
    copy.rename(data)
    main(small(init_from="resume"))
    assert "resuming at step 4" in capsys.readouterr().out
    assert_same_run(undisturbed, log_dir, 12)


@pytest.mark.parametrize("manifest", [False, True])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_that_was_swapped_meanwhile_is_refused(manifest, split, small, tmp_path, log_dir, undisturbed, capsys):
    def write_manifest():
        shards = [
            {"file": path.name, "tokens": len(np.load(path)), "sha256": hash_file(path)}
            for path in sorted((tmp_path / "data").glob("*.npy"))
        ]
        content = {"complete": True, "shards": shards, "tokens": 0, "documents": 0, "skipped_empty": 0}
        (tmp_path / "data" / "manifest.json").write_text(json.dumps(content))

    if manifest:
        write_manifest()
    main(small(max_steps=8))
    name = "tiny_train_000002.npy" if split == "train" else "tiny_val_000000.npy"
    path, kept = tmp_path / "data" / name, tmp_path / name
    path.rename(kept)
    write_shards(tmp_path / "other", [1500, 5000, 3001, 7003], seed=1)
    shutil.copy(tmp_path / "other" / name, path)
    before = read_log(log_dir)
    for renewed in (False, True)[: 1 + manifest]:
        if renewed:
            write_manifest()
        ends_with(f"cannot resume: {name} is not the shard that the run began with", small(init_from="resume"), capsys)
    assert read_log(log_dir) == before
    path.unlink()
    kept.rename(path)
    if manifest:
        (tmp_path / "data" / "manifest.json").unlink()  # the same shards without it
    main(small(init_from="resume"))
    assert load_checkpoint(log_dir / "model_00012.pt")["step"] == 12


# -----------------------------------------------------------------------------
# Checkpoints with a right sha256 and wrong contents


def change(*path, value=None):
    """A function that sets contents[path[0]][path[1]]... to value, or deletes it where that is None."""

    def forge(contents):
        for key in path[:-1]:
            contents = contents[key]
        if value is None:
            del contents[path[-1]]
        else:
            contents[path[-1]] = value

    return forge


WEIGHT = "transformer.h.0.mlp.c_fc.weight"
FORGED = {  # by any use
    "no model": change("model"),
    "model is a list": change("model", value=[1]),
    "a weight of another shape": change("model", WEIGHT, value=torch.zeros(2, 2)),
    "a weight is text": change("model", WEIGHT, value="text"),
    "a weight too many": change("model", "extra", value=torch.zeros(2)),
    "10^8 layers": change("config", "n_layer", value=10**8),
    "10^9 channels": change("config", "n_embd", value=10**9),
    "10^30 channels": change("config", "n_embd", value=10**30),
    "0 heads": change("config", "n_head", value=0),
    "10^12 ids": change("config", "vocab_size", value=10**12),
    "heads are text": change("config", "n_head", value="two"),
    "a config field too many": change("config", "dropout", value=0.1),
    "a config field is missing": change("config", "block_size"),
    "no config": change("config"),
    "no step": change("step"),
    "step is text": change("step", value="12"),
    "train_config is a list": change("train_config", value=[]),
}


def shorten(contents):
    """A whole model, for sequences of 8 tokens."""
    contents["config"]["block_size"] = 8
    contents["model"]["transformer.wpe.weight"] = contents["model"]["transformer.wpe.weight"][:8].clone()


FORGED_FOR_RESUME = {
    "a model of shorter sequences": shorten,
    "a weight is missing": change("model", WEIGHT),  # new, when a run starts from it
    "no optimizer": change("optimizer"),
    "an optimizer without state": change("optimizer", "state"),
    "moments of no parameter": change("optimizer", "state", value={}),
    "moments are missing": change("optimizer", "state", 3),
    "a moment is missing": change("optimizer", "state", 3, "exp_avg_sq"),
    "moments of another shape": change("optimizer", "state", 3, "exp_avg", value=torch.zeros(7)),
    "a moment is a scalar": change("optimizer", "state", 3, "exp_avg", value=torch.zeros(())),
    "a moment is text": change("optimizer", "state", 3, "exp_avg", value="text"),
    "moments of another parameter": change("optimizer", "state", 99, value={}),
    "moments are a list": change("optimizer", "state", value=[]),
    "groups are missing": change("optimizer", "param_groups"),
    "groups of others": change("optimizer", "param_groups", value=[{"params": [0]}]),
    "no data": change("data"),
    "data are a list": change("data", value=[]),
    "a negative step": change("step", value=-3),
    "nonfinite is text": change("nonfinite", value="text"),
}


@pytest.mark.parametrize("kind", [*FORGED, *FORGED_FOR_RESUME])
def test_forged_checkpoints_are_refused_in_words(kind, small, tmp_path, log_dir, undisturbed, capsys):
    contents = load_checkpoint(undisturbed / "model_00008.pt")
    {**FORGED, **FORGED_FOR_RESUME}[kind](contents)
    log_dir.mkdir()
    path = log_dir / "model_00008.pt"
    write_checkpoint(path, contents)
    (log_dir / "log.txt").write_text(before := read_log(undisturbed))
    ends_with("checkpoint|cannot resume", small(init_from="resume"), capsys)
    assert read_log(log_dir) == before
    if kind in FORGED:
        write_items(items := tmp_path / "items.jsonl", 1)
        ends_with("checkpoint", small(init_from=str(path), log_dir=str(tmp_path / "new")), capsys)
        with pytest.raises(SystemExit) as exit:
            run_as_command(hellaswag.run, str(path), "cpu", items, None)
        assert exit.value.code == 2 and "checkpoint" in capsys.readouterr().err


def test_a_checkpoint_of_other_knobs_resumes_and_says_so(small, log_dir, undisturbed, capsys):
    contents = load_checkpoint(undisturbed / "model_00008.pt")
    del contents["train_config"]["collective_timeout"], contents["nonfinite"]
    contents["train_config"]["dropout"] = 0.1
    log_dir.mkdir()
    write_checkpoint(log_dir / "model_00008.pt", contents)
    (log_dir / "log.txt").write_text(read_log(undisturbed))
    main(small(init_from="resume"))
    assert "resuming at step 8, collective_timeout is new, dropout is gone" in capsys.readouterr().out
    assert_same_run(undisturbed, log_dir, 12)


def test_weights_with_too_little_room_are_refused_with_the_remedy(small, tmp_path, undisturbed, capsys):
    path = str(undisturbed / "model_00012.pt")
    for flags in (dict(sequence_length=64), dict(vocab_size=1024), dict(vocab_size=50304)):
        message = "has a block_size of 32 and a vocab_size of 512: .* .of a run, its sequence_length. and .* are needed"
        ends_with(message, small(init_from=path, **flags), capsys)
    main(small(init_from=path, sequence_length=16, n_embd=64, max_steps=1))  # less is fine, and its sizes count


# -----------------------------------------------------------------------------
# log.txt with lines that are none


@pytest.mark.parametrize(
    "line",
    [b"\0" * 40, b"# a comment", b"\xff\xfe\x80", b"6 train", b"6 train 3.5\0\0", b"6 train \0\0"],
)
def test_a_bad_line_in_the_log_is_moved_away_and_the_records_stay(line, small, log_dir, undisturbed, capsys):
    shutil.copytree(undisturbed, log_dir)
    (log_dir / "model_00012.pt").unlink()
    lines = (log_dir / "log.txt").read_bytes().split(b"\n")
    (log_dir / "log.txt").write_bytes(b"\n".join([*lines[:5], line, *lines[5:]]))
    main(small(init_from="resume"))
    out = capsys.readouterr().out
    assert re.search(r"log.txt: \d+ lines moved to log_dropped.txt: from step 8 on", out)
    assert line in (log_dir / "log_dropped.txt").read_bytes().split(b"\n")
    assert_same_run(undisturbed, log_dir, 12)


# -----------------------------------------------------------------------------
# Numbers


BAD = [f"--{name}={value}" for name in ("max_lr", "min_lr_ratio", "grad_clip", "weight_decay")
       for value in ("-1", "nan", "inf", "-inf", "1e999")]  # fmt: skip
BAD += ["--seed=4294967296", "--seed=-1", f"--max_steps={10**30}", f"--total_batch_size={2**70}", "--n_head=0"]


@pytest.mark.parametrize("flag", BAD)
def test_numbers_out_of_range_are_refused_before_anything_starts(flag, small, tmp_path, log_dir, capsys):
    name = flag[2:].split("=")[0]
    ends_with(f"{name} is .*it must be", parse_args([*flags_of(small()), flag]), capsys)
    assert not log_dir.exists()


def test_an_empty_prompt_is_refused_before_anything_starts(small, log_dir, capsys):
    ends_with("sample_prompt is empty", small(sample_every=4, vocab_size=50304, sample_prompt=""), capsys)
    assert not log_dir.exists()


@pytest.mark.parametrize("flag", ["--max_steps=1e3", "--n_layer=x", "--max_lr=", "--compile=perhaps"])
def test_flags_that_are_no_numbers_are_refused(flag):
    with pytest.raises(SystemExit) as exit:
        parse_args([flag])
    assert exit.value.code == 2


NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 7, 2**31, 2**32, 2**62, 10**30]) | st.floats()
SIZES = dict(
    n_layer=[1, 2, 0], n_head=[1, 2, 3], n_embd=[8, 12, 30], vocab_size=[512, 50257, 50304, 300, 1], max_steps=[0, 1],
    sequence_length=[16, 5, 1], total_batch_size=[16, 30, 64, 160, 2**40, 2**62], micro_batch_size=[1, 2, 3, 2**40],
    keep_checkpoints=[2, 3, 2**31, 0], device=["auto", "cpu", "cuda", "tpu"], compile=[None, False], data_source=[""],
    dtype=["auto", "float32", "bfloat16", "float16", "int8"], init_from=["scratch", "resume", "", "gpt5", "/dev/null"],
    activation_checkpointing=[None, False, True],
)  # fmt: skip


def any_knobs():
    """A small run with up to four knobs at random, in range or not; numbers that cost nothing are any numbers."""
    knob = {name: st.sampled_from(values) for name, values in SIZES.items()}
    knob |= {field.name: NUMBERS for field in dataclasses.fields(TrainConfig) if field.name not in knob}
    knob |= {"sample_prompt": st.text(max_size=40), "data_dir": st.just("nowhere"), "log_dir": st.just("/dev/null")}
    one = st.sampled_from(sorted(knob)).flatmap(lambda name: st.tuples(st.just(name), knob[name]))
    return st.lists(one, max_size=4).map(dict)


def test_any_knobs_give_a_run_or_a_message(tmp_path, monkeypatch, capsys):
    write_shards(tmp_path / "data", [300, 500])
    write_items(tmp_path / "hellaswag_val.jsonl", 2)
    monkeypatch.setattr(hellaswag, "FOLDER", tmp_path)
    base = dict(
        n_layer=1, n_head=2, n_embd=12, vocab_size=512, sequence_length=16, sample_every=0, hellaswag_every=0,
        plot_every=0, total_batch_size=64, micro_batch_size=2, max_steps=2, val_tokens=100, device="cpu",
        data_dir=str(tmp_path / "data"), log_dir=str(tmp_path / "log"),
    )  # fmt: skip
    ends = []

    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(any_knobs())
    def check(chosen):
        shutil.rmtree(tmp_path / "log", ignore_errors=True)
        try:
            main(TrainConfig(**{**base, **chosen}))
            ends.append("run")
        except UserError:
            ends.append("message")

    check()
    assert min(ends.count("run"), ends.count("message")) >= 10


def test_a_diverged_run_ends_with_the_remedy_and_not_in_its_samples(small):
    with pytest.raises(UserError, match="NaN or infinite in steps .*try a lower max_lr"):
        main(small(max_lr=1e29, warmup_steps=0, vocab_size=50304, n_embd=8, sample_every=1))


# -----------------------------------------------------------------------------
# The end


def test_a_signal_during_the_last_samples_ends_a_loop_around_the_run(small, log_dir, monkeypatch, capfd):
    sample, calls = train_gpt2.sample, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return sample(*args)

    monkeypatch.setattr(train_gpt2, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(small(vocab_size=50304, n_embd=8, sample_every=100, max_steps=1))
    out, err = capfd.readouterr()
    assert "next: python" in out and err.count("once more ends now, unsaved") == 1
    assert (log_dir / "model_00001.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGQUIT, signal.SIGRTMAX])
@pytest.mark.parametrize("torchrun", [False, True])
def test_the_exit_code_tells_the_signal(number, torchrun, small, log_dir, undisturbed, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        if torchrun:
            patch.setenv("TORCHELASTIC_RUN_ID", "1234")
            patch.setattr(os, "_exit", sys.exit)  # this process lives on
        patch.setattr("lib.console.die_of", lambda number: sys.exit(-number))
        at_step(patch, {6}, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as exit:
            run_as_command(main, small())
        assert exit.value.code == (0 if torchrun else -number)  # torchrun would restart a rank that exits with it
    out = capsys.readouterr().out
    assert "next:" not in out and "Output in" not in out and out.endswith("--init_from resume\n")
    main(small(init_from="resume"))
    assert "resuming at step 7" in capsys.readouterr().out
    assert_same_run(undisturbed, log_dir, 12)


def test_a_run_without_a_checkpoint_promises_none(small, tmp_path, capsys):
    for name, flags in (("a", dict(max_steps=0)), ("b", dict(checkpoint_every=0))):
        main(small(log_dir=str(tmp_path / name), **flags))
        out = capsys.readouterr().out
        assert "done: " in out and "next:" not in out and "Output in" not in out


def test_a_changed_weight_decay_is_applied_at_resume(small, tmp_path, monkeypatch):
    """The same weights as where the running optimizer gets the new value in that step."""
    optimizers, AdamW = [], torch.optim.AdamW

    def build(*args, **kwargs):
        optimizers.append(AdamW(*args, **kwargs))
        return optimizers[-1]

    monkeypatch.setattr(torch.optim, "AdamW", build)
    main(small(max_steps=8, min_lr_ratio=1))
    main(small(init_from="resume", weight_decay=9, min_lr_ratio=1))
    at_step(monkeypatch, {8}, lambda: optimizers[-1].param_groups[0].update(weight_decay=9))
    main(small(log_dir=str(tmp_path / "in flight"), min_lr_ratio=1))
    a, b = (load_checkpoint(tmp_path / name / "model_00012.pt") for name in ("log", "in flight"))
    assert_same(a["model"], b["model"])
    assert [group["weight_decay"] for group in a["optimizer"]["param_groups"]] == [9, 0]


@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("float16", "float32"), ("float16", "float16")])
def test_a_run_resumes_with_another_dtype(dtypes, small, log_dir, capsys):
    main(small(max_steps=8, dtype=dtypes[0]))
    main(small(init_from="resume", dtype=dtypes[1]))
    out = capsys.readouterr().out
    assert (f"dtype {dtypes[0]} -> {dtypes[1]}" in out) == (dtypes[0] != dtypes[1])
    assert "NOT FINITE" not in out and load_checkpoint(log_dir / "model_00012.pt")["step"] == 12


# -----------------------------------------------------------------------------
# torchrun


def test_a_rank_that_raises_ends_the_job_with_its_message(small):
    """At once, that is, and not after the ten minutes that the other rank would wait for it."""
    result = run_warm(PROBES / "raises_on_rank_1.py", *flags_of(small(micro_batch_size=2)), ranks=2)
    assert result.returncode and "[rank 1] error: rank 1 says why" in result.stdout, result.stdout


def test_ranks_wait_for_one_that_ends_late_whatever_signals_come(small):
    flags = flags_of(small(micro_batch_size=2, collective_timeout=3))
    result = run_warm(PROBES / "late_end.py", *flags, ranks=2)
    assert result.returncode == 0, result.stdout


def test_a_run_that_is_refused_leaves_the_signals_to_its_caller(small):
    main(small())
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError, match="holds a run") as error:
        main(small())
    assert signal.getsignal(signal.SIGINT) is before and error  # while its traceback is alive


@pytest.mark.parametrize("wrong", [{"max_steps": 4.0}, {"val_every": None}, {"max_lr": "1e-3"}, {"compile": 2}])
def test_a_knob_of_another_type_is_refused(wrong, small, log_dir):
    with pytest.raises(UserError, match="it must be"):
        main(small(**wrong))
    assert not log_dir.exists()


def test_numbers_of_numpy_and_paths_make_checkpoints_that_can_be_loaded(small, log_dir):
    config = small(max_lr=np.float64(1e-3), n_layer=np.int64(1), log_dir=log_dir, data_dir=log_dir.parent / "data")
    main(config)
    main(dataclasses.replace(config, init_from="resume", max_steps=np.int32(14)))
    assert load_checkpoint(log_dir / "model_00014.pt")["train_config"]["max_lr"] == 1e-3


def test_a_run_in_a_thread_ends_well(small):
    found = []
    thread = threading.Thread(target=lambda: found.append(main(small())))
    thread.start()
    thread.join()
    assert found[0]["step"] == 12


def test_a_folder_of_other_files_is_not_filled_with_the_demo(small, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    with pytest.raises(UserError, match="holds other files and no shards"):
        main(small(data_dir=str(tmp_path / "texts"), data_source="demo"))
    assert os.listdir(tmp_path / "texts") == ["a.txt"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_restarts_do_not_walk_around_a_run_of_another_launch(small, log_dir):
    main(small())
    before = read_log(log_dir)
    (log_dir / "lock").write_text("process 1 on host, torchrun none")  # the id of all launches with --master_port
    command = command_of("train_gpt2.py", *flags_of(small(max_steps=20)), ranks=1, restarts=1)
    command[command.index("--standalone")] = f"--master_port={free_port()}"
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=150)
    assert result.returncode == 1 and result.stderr.count("holds a run") == 2, result.stderr
    assert read_log(log_dir) == before and not (log_dir / "model_00020.pt").exists()
