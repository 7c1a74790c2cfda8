"""What is decided by the device, with stand-ins where there is none of its kind."""

import os

import pytest
import torch
from support import flags_of, losses, run_warm
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib import device
from lib.console import UserError


@pytest.fixture
def two_gpus(monkeypatch):
    """torch.cuda as on a machine of two GPUs, of which the one that was made current is recorded."""
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("LOCAL_WORLD_SIZE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is removed in the end, whoever sets it
        monkeypatch.delenv(name)
    return current


@pytest.mark.parametrize("local_rank", [0, 3])
def test_more_ranks_than_gpus_are_refused_on_every_rank(local_rank, two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="started 4 ranks .* sees 2 GPUs: give it --nproc_per_node=2"):
        device.claim_gpu(local_rank)
    assert not two_gpus


def test_an_apple_gpu_is_refused_under_torchrun():
    with pytest.raises(UserError, match="use --device cpu"):
        device.choose_device("mps", 0, in_group=True)


def test_the_allocator_maps_pages_unless_the_user_has_configured_it(two_gpus, monkeypatch):
    assert device.claim_gpu(1) == torch.device("cuda:1") and two_gpus == [1]
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    device.claim_gpu(0)
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def test_changing_lengths_go_without_cudnn():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with device.flash_attention():
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_the_kernel_of_attention_is_the_one_that_torch_takes():
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            name = device.attention_kernel(4, 128, 12, torch.float32, torch.device("cpu"))
        assert name == backend.name.lower()


def test_without_a_compiler_a_run_goes_on_uncompiled(tiny, tmp_path):
    (tmp_path / "bin").mkdir()
    env = {"PATH": str(tmp_path / "bin"), "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = run_warm("train_gpt2.py", "--compile", *flags_of(tiny(max_steps=2)), env=env)
    assert result.returncode == 0 and "Traceback" not in result.stdout, result.stdout
    assert "warning: torch.compile is off" in result.stdout and "apt-get install g++" in result.stdout
    assert "compile off" in result.stdout and len(losses(tmp_path / "log", "train")) == 2


def test_each_run_begins_with_a_fresh_compiler():
    """Whatever was compiled before: the compiler, which by default gives up after 8 shapes, starts anew."""
    cpu, compiled = torch.device("cpu"), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def module():
        return torch.nn.Linear(2, 2)

    original = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **options: original(f, backend=backend, **options))
        for n in range(1, 11):
            before = len(compiled)
            device.compile_model(module(), True, cpu)(torch.zeros(n, 2))
            assert len(compiled) - before == 2, n  # the trial kernel and the model
