"""The bench measures what it says: its rows compute the same, and it runs to its end. Its times are nobody's test."""

import json
from argparse import Namespace

import pytest
import torch
from support import TINY

from tools import bench
from tools.bench import CUDA_ONLY, LADDER, Trainer, measure
from train_gpt2 import TrainConfig


def test_fifty_steps_with_all_optimizations_equal_the_plain_formulation():
    names = [name for name in LADDER if name not in CUDA_ONLY]
    config = TrainConfig(**{**TINY, "sequence_length": 64})
    pair = [Trainer(torch.device("cpu"), config, on, vocab_size=1000) for on in (names[:1], names)]
    generator = torch.Generator().manual_seed(0)
    losses = []

    def draw():
        tokens = (torch.rand(16, 65, generator=generator) ** 8 * 1000).long()
        losses.append(pair[0].loss(tokens[:, :-1], tokens[:, 1:]).item())
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    _, difference = measure(pair, draw, steps=47)
    assert len(losses) == 50 and losses[-1] < losses[0] - 0.2  # it has learned meanwhile
    assert 0 < difference < 1e-3


def test_every_row_computes_the_same_step():
    config = TrainConfig(**TINY)
    x = torch.randint(512, (4, 32), generator=torch.Generator().manual_seed(0))
    names = [name for name in LADDER if name not in CUDA_ONLY]
    rows = [Trainer(torch.device("cpu"), config, names[: i + 1], vocab_size=512) for i in range(len(names))]
    for _ in range(3):
        losses = [row.step(x, x)[1] for row in rows]
        assert losses == pytest.approx([losses[0]] * len(rows), abs=1e-5)


def test_the_command_writes_its_figures(tmp_path):
    bench.main(Namespace(batch=1, steps=1, json=tmp_path / "a.json", plot=tmp_path / "a.png"))
    figures = json.loads((tmp_path / "a.json").read_text())
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert figures["ladder"][0]["row"] == "plain float32" and all(row["ms"] > 0 for row in figures["ladder"])
    assert figures["all_rows"]["largest_loss_difference"] < 1e-3
