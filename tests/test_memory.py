"""Micro-batches that do not fit in rehearsal."""

import gc
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from support import PROBES, flags_of, losses, run, run_warm, write_shards

from lib.console import UserError
from lib.model import rehearsal
from lib.model.rehearsal import fit_in_memory
from train_gpt2 import GPT, GPTConfig, main


def test_what_does_not_fit_on_one_rank_is_made_smaller_on_all(tiny, tmp_path):
    write_shards(tmp_path / "data", [1500, 40_000])
    shape = dict(sequence_length=64, n_embd=64, total_batch_size=2 * 256 * 64, max_steps=2, val_every=0)
    main(tiny(log_dir=str(tmp_path / "free"), micro_batch_size=32, **shape))
    config = tiny(log_dir=str(tmp_path / "limited"), micro_batch_size=256, **shape)
    result = run_warm(PROBES / "limited_memory.py", *flags_of(config), ranks=2, timeout=100)
    assert result.returncode == 0, result.stdout
    assert "reduced from 256: out of memory" in result.stdout
    free, limited = (losses(tmp_path / name, "train") for name in ("free", "limited"))
    assert limited == pytest.approx(free, abs=1e-5) and len(limited) == 2


@pytest.fixture(autouse=True)
def little_garbage():
    """What does not fit is collected after each trial: of this test, not of all of pytest."""
    gc.freeze()
    yield
    gc.unfreeze()


def fail_where(monkeypatch, does_not_fit):
    """Let CUDA's error come from each rehearsal for which does_not_fit(model, micro-batch size)."""
    try_step = rehearsal.try_step

    def limited(model, optimizer, B, *args):
        if does_not_fit(model, B):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        try_step(model, optimizer, B, *args)

    monkeypatch.setattr(rehearsal, "try_step", limited)


def test_activation_checkpointing_comes_by_itself_where_nothing_else_fits(tiny, tmp_path, monkeypatch, capsys):
    main(tiny(log_dir=str(tmp_path / "free"), max_steps=6))
    fail_where(monkeypatch, lambda model, B: not model.activation_checkpointing or B > 1)
    main(tiny(log_dir=str(tmp_path / "limited"), max_steps=6))
    said = "micro-batches of 1 x 32, 16 per rank (reduced from 4: out of memory; activation checkpointing on)"
    assert said in capsys.readouterr().out
    free, limited = (losses(tmp_path / name, "train") for name in ("free", "limited"))
    assert limited == pytest.approx(free, abs=1e-5) and len(limited) == 6


def test_a_model_for_which_nothing_fits_is_refused(tiny, monkeypatch):
    fail_where(monkeypatch, lambda model, B: True)
    with pytest.raises(UserError, match="not even a micro-batch of 1 fits in memory"):
        main(tiny())


@pytest.mark.parametrize(
    "recompute, limit, found",
    [(None, 2, (2, " (reduced from 12: out of memory)")), (False, 2, (2, " (reduced from 12: out of memory)")),
     (True, 12, (12, " (activation checkpointing on)")),
     (None, 0, (4, " (reduced from 12: out of memory; activation checkpointing on)"))],
)  # fmt: skip
def test_the_largest_power_of_two_that_divides_the_rows(recompute, limit, found):
    tried = []

    def attempt(size, recompute):
        tried.append(size)
        if size > (limit or 4 * recompute):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert fit_in_memory(attempt, 12, 24, recompute, torch.device("cpu")) == found
    assert tried == {2: [12, 8, 4, 2], 12: [12], 0: [12, 8, 4, 2, 1, 12, 8, 4]}[limit]


def test_other_errors_and_hopeless_cases_are_raised():
    for message, error in (("a shape is wrong", RuntimeError), ("CUDA out of memory", UserError)):
        with pytest.raises(error):
            fit_in_memory(Mock(side_effect=RuntimeError(message)), 4, 4, None, torch.device("cpu"))


def test_activation_checkpointing_keeps_less_and_changes_no_gradient():
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 512, 6, 2, 32))
    x = torch.randint(512, (4, 32))
    kept, gradients = [], []
    for model.activation_checkpointing in (False, True):
        sizes = {}

        def keep(tensor):
            sizes[tensor.data_ptr()] = tensor.nbytes  # noqa: B023
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _, loss = model(x, x)
        loss.backward()
        kept.append(sum(sizes.values()))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert kept[1] < 0.5 * kept[0], kept


def test_on_a_cpu_a_size_is_compared_with_the_free_memory_and_said_before_it_is_tried(tiny, monkeypatch, capsys):
    model = GPT(GPTConfig(32, 512, 2, 2, 32))
    model.fast_loss = True  # as a run takes it
    room = (rehearsal.cpu_bytes(model, 2 * 32, False, True) + rehearsal.cpu_bytes(model, 4 * 32, False, True)) / 2
    monkeypatch.setattr(rehearsal, "free_memory", lambda: room)
    main(tiny(max_steps=1, micro_batch_size=16))
    out = capsys.readouterr().out
    assert "micro-batches of 2 x 32, 8 per rank (reduced from 16: out of memory)" in out
    said = re.findall(r"micro-batches of (\d+) x 32: [\d.]+ GB needed, [\d.]+ free(: too much)?", out)
    assert [size for size, too_much in said if too_much] == ["16", "8", "4"] and said[3:] == [("2", "")]
    assert out.index("needed") < out.index("steps of 512 tokens")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_cpu_needs_is_known_beforehand():
    result = run(PROBES / "cpu_memory.py")
    assert result.returncode == 0, result.stdout
    grew, expected = map(float, result.stdout.split())
    assert 0.7 * grew < expected < 1.5 * grew


def test_the_limits_of_all_control_groups_count(tmp_path, monkeypatch):
    root = tmp_path / "sys/fs/cgroup"
    files = {
        tmp_path / "proc/self/cgroup": "0::/a/b\n",
        tmp_path / "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n",
        root / "a/b/memory.max": "max\n",
        root / "a/memory.max": "5000000\n",
        **{root / f"{group}/memory.current": "3000000\n" for group in ("a", "a/b")},
        **{root / f"{group}/memory.stat": "anon 1\ninactive_file 500000\n" for group in ("a", "a/b")},
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(rehearsal, "Path", lambda first, *more: Path(tmp_path, first.lstrip("/"), *more))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert rehearsal.free_memory() == (5_000_000 - 3_000_000 + 500_000) / 2
