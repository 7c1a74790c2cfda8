import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train_gpt2 import TrainConfig  # noqa: E402

TINY = dict(
    n_layer=2, n_head=2, n_embd=32, vocab_size=512, sequence_length=32, total_batch_size=512, micro_batch_size=2,
    max_steps=20, warmup_steps=2, max_lr=1e-2, val_every=5, val_tokens=1000, hellaswag_every=0, sample_every=0,
    checkpoint_every=10, device="cpu",
)  # fmt: skip


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU, skipped elsewhere")


def write_shards(folder, lengths, vocab_size=512, seed=0, name="tiny"):
    """Shards of text with something to learn: each token follows from the one before, plus noise. Returns the stream
    of train tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shards = []
    for index, length in enumerate(lengths):
        noise = rng.integers(0, 4, length)
        tokens = ((np.cumsum(noise) * 7) % vocab_size).astype("<u2")
        np.save(folder / f"{name}_{'val' if index == 0 else 'train'}_{index:06d}.npy", tokens)
        shards.append(tokens)
    return np.concatenate(shards[1:])


@pytest.fixture
def tiny(tmp_path):
    """A function that makes the TrainConfig of a tiny run on CPU; its shards are in tmp_path/data."""
    write_shards(tmp_path / "data", [1500, 5000, 3001, 7003])
    torch.set_num_threads(1)
    return lambda **overrides: TrainConfig(
        **{**TINY, "data_dir": str(tmp_path / "data"), "log_dir": str(tmp_path / "log"), **overrides}
    )


def run(script, *args, ranks=0, cwd=None, env=None, timeout=280):
    """Run a script as a user does, under torchrun where ranks are given; returns the CompletedProcess."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*(command if ranks else [sys.executable]), str(ROOT / script), *map(str, args)]
    return subprocess.run(
        command, cwd=cwd or ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
    )  # fmt: skip


def flags_of(config, **overrides):
    """The command line of a TrainConfig."""
    from dataclasses import asdict

    return [f"--{k}={v}" for k, v in {**asdict(config), **overrides}.items() if v is not None and k != "compile"]


def read_log(log_dir):
    return (Path(log_dir) / "log.txt").read_text()
