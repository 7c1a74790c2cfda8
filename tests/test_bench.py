"""The bench measures what it says: its rows compute the same, and it runs to its end. Its times are nobody's test."""

import re

import pytest
import torch
from support import TINY

from tools import bench
from tools.bench import CUDA_ONLY, LADDER, Trainer
from train_gpt2 import TrainConfig


def test_every_row_computes_the_same_step():
    config = TrainConfig(**TINY)
    x = torch.randint(512, (4, 32), generator=torch.Generator().manual_seed(0))
    names = [name for name in LADDER if name not in CUDA_ONLY]
    rows = [Trainer(torch.device("cpu"), config, names[: i + 1], vocab_size=512) for i in range(len(names))]
    first = rows[0].loss(x, x).item()
    for _ in range(20):
        losses = [row.step(x, x) for row in rows]
        assert losses == pytest.approx([losses[0]] * len(rows), abs=1e-4)
    assert losses[0] < first - 0.2  # it has learned meanwhile


def test_the_command_prints_every_row(monkeypatch, capsys):
    monkeypatch.setitem(bench.PRESETS, "demo", dict(n_layer=1, n_head=1, n_embd=8, sequence_length=8))
    bench.main(["--batch=1"])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row[:18].strip() for row in rows] == [name for name in LADDER if name not in CUDA_ONLY] + ["transformers"]
    assert all(re.search(r" [\d.]+ ms +[\d,]+ tokens/s  x [\d.]+ the row above", row) for row in rows)
