"""What is decided by the device, with stand-ins where there is none of its kind."""

import os

import pytest
import torch

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


def test_the_allocator_maps_pages_unless_the_user_has_configured_it(two_gpus, monkeypatch):
    assert device.claim_gpu(1) == torch.device("cuda:1") and two_gpus == [torch.device("cuda:1")]
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
