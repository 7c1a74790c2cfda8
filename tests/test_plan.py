"""The plan says what a run then takes."""

import re

import pytest
import torch
from support import ROOT, load, losses, run_warm

from lib.device import SPEEDS, peak_tflops
from tools import plan
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig, main


def config_of(preset, **overrides):
    return TrainConfig(**{**PRESETS[preset], **overrides})


def on_meta(config):
    with torch.device("meta"):
        return GPT(GPTConfig.of(config))


@pytest.mark.parametrize("preset", PRESETS)
def test_operations_are_those_of_the_model(preset):
    c = config_of(preset)
    model = on_meta(c)
    blocks = c.n_layer * (12 * c.n_embd**2 + 13 * c.n_embd)  # 9 of 13 biases, 4 layer norms
    n = blocks + c.vocab_size * c.n_embd + 2 * c.n_embd  # the positions do not count
    assert model.flops_per_token() == 6 * n + 6 * c.n_layer * c.n_embd * c.sequence_length
    assert f"{n + c.sequence_length * c.n_embd:,} parameters" in plan.describe(plan.PlanConfig(**vars(c)), model, None)


def test_the_speeds_of_gpus_are_those_of_the_page_and_of_a_run():
    assert on_meta(config_of("gpt2")).flops_per_token() == plan.FLOPS_OF_124M
    c = plan.PlanConfig()
    printed, page = plan.describe(c, on_meta(c), None), (ROOT / "docs" / "rented_gpu.md").read_text()
    for gpu, (speed, source) in SPEEDS.items():
        hours = c.max_steps * c.total_batch_size / speed / 3600
        share = speed * plan.FLOPS_OF_124M / peak_tflops(gpu) / 1e12
        row = (
            rf"\| {gpu}( SXM)? \| {speed:,} \| {share:.0%} of {peak_tflops(gpu)} TFLOP/s \| {hours:.1f} \| {source[:8]}"
        )
        assert re.search(row, page) and f"  {gpu}, {speed:,} tokens/s" in printed and source in printed


def test_memory_and_disk_are_those_of_a_run(tiny, tmp_path):
    c = tiny(max_steps=1)
    main(c)
    path = tmp_path / "log" / "model_00001.pt"
    checkpoint = load(path)
    moments = sum(v.nbytes for s in checkpoint["optimizer"]["state"].values() for v in s.values() if v.dim())
    weights = {p.data_ptr(): p.nbytes for p in checkpoint["model"].values()}  # the tied matrix once
    n = sum(p.numel() for p in on_meta(c).parameters())
    assert sum(weights.values()) == 4 * n and moments == 8 * n
    assert plan.STATE * n == 4 * n + 4 * n + 8 * n + 2 * n  # weights, gradients, moments, the 16-bit copy
    assert path.stat().st_size == pytest.approx(12 * n, abs=50_000)


@pytest.mark.parametrize("sequences, measured", [(32, 14.4), (64, 26.6)])
def test_memory_is_what_an_h200_took(sequences, measured):
    """Measured with GPT-2 124M, T=1024, bfloat16, compile, torch 2.11.0, 2026-11-22."""
    c = config_of("gpt2")
    n = sum(p.numel() for p in on_meta(c).parameters())
    memory = plan.STATE * n + plan.activation_bytes(c, sequences)
    assert memory / 2**30 == pytest.approx(measured, rel=0.03)


def test_the_command_prints_it_with_any_setting_and_writes_nothing(tmp_path):
    flags = ["--preset=gpt2-xl", "--speed=40000", "--price=2.5", f"--data_dir={tmp_path}", "--max_steps=9536"]
    result = run_warm("tools/plan.py", *flags)
    assert result.returncode == 0, result.stdout
    assert "1,557,686,400" in result.stdout and "69.4 hours, 173.60 at 2.5 per hour" in result.stdout, result.stdout
    assert not list(tmp_path.iterdir())


def test_a_run_begins_with_its_plan_in_a_line(tiny, tmp_path, capsys):
    main(tiny(max_steps=2))
    assert (
        "plan: 2 steps x 512 = 1,024 tokens" in capsys.readouterr().out and len(losses(tmp_path / "log", "train")) == 2
    )


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("Tesla T4", 65),
        ("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("CPU", None),
        ("Tesla V100-SXM2-16GB", 125), ("NVIDIA RTX A6000", 155), ("NVIDIA RTX 6000 Ada Generation", 364),
    ],
)  # fmt: skip
def test_the_peak_of_a_device_by_its_real_name(name, peak):
    assert peak_tflops(name) == peak
