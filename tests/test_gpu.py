"""What a CPU cannot show. Skipped where there is no CUDA GPU."""

import json
import re

import pytest
import torch
from support import PROBES, TINY, flags_of, losses, make_items, run, write_shards

from train_gpt2 import TrainConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture
def on_gpu(tmp_path):
    """The command line of a small run on CUDA, with all that evaluates during training."""
    write_shards(tmp_path / "data", [20_000, 200_000])
    settings = {
        **TINY, "vocab_size": 50304, "n_embd": 128, "sequence_length": 128, "total_batch_size": 4096, "max_lr": 3e-3,
        "micro_batch_size": 8, "max_steps": 12, "val_every": 4, "sample_every": 4, "hellaswag_every": 4,
        "device": "cuda", "data_dir": str(tmp_path / "data"),
    }  # fmt: skip
    return lambda **overrides: flags_of(TrainConfig(**{**settings, **overrides}))


def test_compile_stays_on_and_nothing_recompiles_after_step_0(on_gpu, tmp_path):
    (tmp_path / "hellaswag_val.jsonl").write_text("".join(json.dumps(item) + "\n" for item in make_items(50)))
    env = {"TORCH_LOGS": "recompiles", "HELLASWAG_FOLDER": str(tmp_path)}
    result = run(PROBES / "hellaswag_at.py", *on_gpu(log_dir=str(tmp_path / "log")), env=env)
    assert result.returncode == 0, result.stdout
    assert "compile on" in result.stdout
    before, after = re.split(r"step +0/12 ", result.stdout)
    assert "idx is targets" not in before and "stride mismatch" not in before  # what the rehearsal compiled is used
    assert "Recompiling" not in after and after.count("| HellaSwag") == 3 and after.count("| sample") == 9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_train_like_float32(dtype, on_gpu, tmp_path):
    for name in (dtype, "float32"):
        flags = on_gpu(log_dir=str(tmp_path / name), dtype=name, hellaswag_every=0, sample_every=0)
        result = run("train_gpt2.py", *flags)
        assert result.returncode == 0, result.stdout
    a, b = (losses(tmp_path / name, "val") for name in (dtype, "float32"))
    assert a == pytest.approx(b, abs=0.05) and a[12] < a[0] - 1


def test_a_resumed_run_goes_on_with_its_scaler(on_gpu, tmp_path):
    flags = dict(log_dir=str(tmp_path / "log"), dtype="float16", hellaswag_every=0, sample_every=0, checkpoint_every=6)
    assert run("train_gpt2.py", *on_gpu(**flags, max_steps=6)).returncode == 0
    result = run("train_gpt2.py", *on_gpu(**flags, init_from="resume"))
    assert result.returncode == 0 and "resuming at step 6" in result.stdout, result.stdout
    scaler = torch.load(tmp_path / "log" / "model_00012.pt", weights_only=True)["scaler"]
    assert scaler["scale"] >= 1


def test_124m_trains_on_a_card_of_8_gb(tmp_path):
    write_shards(tmp_path / "data", [20_000, 200_000])
    flags = ["--total_batch_size=65536", "--max_steps=3", "--val_every=3", "--val_tokens=65536", "--hellaswag_every=0"]
    folders = ["--data_dir", tmp_path / "data", "--log_dir", tmp_path / "log"]
    result = run(PROBES / "card_of_8_gb.py", *flags, *folders)
    assert result.returncode == 0 and "64 do not fit in memory" in result.stdout, result.stdout
    assert len(losses(tmp_path / "log", "train")) == 3
