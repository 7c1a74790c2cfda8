"""
The machine: the ranks of torchrun (alone, without it, there is one), the device, what it can do.
"""

import contextlib
import gc
import os
import sys
import time
from collections import Counter
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist

from lib.common import InputError

# dense 16-bit matrix products by datasheet, TFLOP/s
PEAK_TFLOPS = {"H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "V100": 125}


@contextlib.contextmanager
def distributed(device, timeout):
    """Be in torchrun's process group, if there is one, for the time of the run: (rank, local_rank, world_size, device).

    Ranks that wait for a dead or hung one give up after `timeout` seconds; between joining and the first step after
    half an hour, since building data and compiling take their time.
    """
    rank, local_rank, world_size = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but torch sees no CUDA GPU: check nvidia-smi, or use --device cpu")
    device = torch.device(device, local_rank if device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size:
        on_device = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # torchrun's store still has the addresses of the ranks before a restart; machines count restarts apart
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        limit = timedelta(seconds=timeout)
        dist.init_process_group(store=store, rank=rank, world_size=world_size, timeout=limit, **on_device)
        set_timeout(max(1800, timeout))
    try:
        yield rank, local_rank, max(world_size, 1), device
        wait_for_all()  # a rank that leaves early takes its connections from the others
    finally:
        if world_size:
            dist.destroy_process_group()


def set_timeout(seconds):
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(tensor):
    """Sum a tensor over all ranks in place and return it; alone, it is the sum."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def name_and_peak(device):
    """The device's name, and its PEAK_TFLOPS where that is known, else None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return name, next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def fit_in_memory(attempt, size, total, recompute, device):
    """Return the first (size, what to say of it) with which attempt(size, recompute) fits on all ranks: the size given,
    else the largest power of two that divides total; with activation checkpointing if recompute, or, where that is
    None, if nothing fits without. Raises InputError where nothing fits at all.
    """
    sizes = [size] + [2**i for i in reversed(range(size.bit_length())) if 2**i < size and total % 2**i == 0]
    for checkpointing in [False, True] if recompute is None else [recompute]:
        for n in sizes:
            short = 0
            try:
                attempt(n, checkpointing)
            except RuntimeError as error:
                # torch.OutOfMemoryError is CUDA's; Apple's and the CPU's have no class of their own
                if not any(words in str(error) for words in ("out of memory", "ALLOC_FAILED", "can't allocate memory")):
                    raise
                short = 1
            if sum_over_ranks(torch.tensor(short, device=device)).item() == 0:
                why = f", since {size} do not fit in memory" if n < size else ""
                return n, why + (", with activation checkpointing" if checkpointing else "")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()  # it compiles for a limited number of shapes
    raise InputError(f"not even a micro-batch of {n} fits in memory: choose a smaller model or sequence_length")


class Stopwatch(Counter):
    """Seconds by what they were spent on; as a string, their shares."""

    @contextlib.contextmanager
    def timing(self, what):
        start = time.perf_counter()
        yield
        self[what] += time.perf_counter() - start

    def __str__(self):
        return ", ".join(f"{what} {seconds / self.total():.1%}" for what, seconds in self.most_common())


def choose_dtype(name, device):
    if name == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32 if name == "auto" else getattr(torch, name)


def choose_compile(wanted, device):
    if wanted is not False and device.type == "cuda" and not find_spec("triton"):
        print("warning: torch.compile is off, because Triton is not installed: pip install triton", flush=True)
        return False
    return device.type == "cuda" if wanted is None else wanted


def to_device(tensor, device):
    """Copy to the device; to CUDA from pinned memory, so that the host runs ahead instead of waiting for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
