"""
The device of a rank, its name and peak, and its compiler.
"""

import functools
import os
import re
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib.console import UserError, say

# dense 16-bit matrix products with 32-bit sums by datasheet, TFLOP/s, keyed by a part of the device's name
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "GH200": 989, "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835,
    "H100": 989, "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A40": 150, "A10G": 70, "A10": 125,
    "RTX A6000": 155, "RTX 6000 Ada": 364, "RTX 4090": 165, "RTX 3090 Ti": 80, "RTX 3090": 71, "V100": 125, "T4": 65,
}  # fmt: skip


def name_of(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def mfu(flops, device):
    """Model FLOPs utilization: FLOP per second as a fraction of the device's peak; None if that is not known."""
    peak = peak_tflops(name_of(device))
    return flops / (peak * 1e12) if peak else None


def peak_tflops(name):
    """PEAK_TFLOPS of a device's name, None if unknown."""
    if re.search(r"\b(Laptop|MIG|Max-Q|4090 D)\b", name):  # part of a chip, or slower than the card of that name
        return None
    return next((peak for known, peak in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def default_device():
    """The type of the best device here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name):
    """Raise UserError if torch cannot use a device of that name."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without CUDA
        raise UserError(f"cannot use device {name!r}: {str(error):.200}. Choose cuda, mps or cpu with -d") from None


def choose_device(name, local_rank, in_group):
    """The device of a rank, by a type or "auto". Raises UserError if it is not available."""
    if name == "auto":
        name = default_device()
        name = "cpu" if name == "mps" and in_group else name
    elif name == "mps" and in_group:
        raise UserError("torchrun's ranks cannot use an Apple GPU, on which gloo cannot sum: use --device cpu")
    if {"cuda": torch.cuda, "mps": torch.backends.mps}.get(name, torch.cpu).is_available() is False:
        raise UserError(f"device is {name}, but torch sees no such GPU: check nvidia-smi, or use --device cpu")
    return claim_gpu(local_rank) if name == "cuda" else torch.device(name)


def claim_gpu(local_rank):
    """Make this rank's GPU the current one and return it. Raises UserError if torchrun started more ranks on this
    machine than it has GPUs.

    Unless the user has configured PyTorch's allocator, it is set to map memory page by page: with fixed segments, the
    gaps between tensors add up to a third of GPT-2 124M's memory.
    """
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE") or local_rank + 1), torch.cuda.device_count()
    if ranks > gpus:
        raise UserError(
            f"torchrun started {ranks} ranks on this machine, but torch sees {gpus} GPUs: give it --nproc_per_node="
            f"{gpus}, and check nvidia-smi and CUDA_VISIBLE_DEVICES if there are more"
        )
    chosen = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys()
    if not chosen and sys.platform == "linux":
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # read at the first CUDA call
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def precision(name, device):
    """(autocast, scaler) for matrix products in the dtype named, or for "auto" in 16 bits on CUDA: bfloat16 if the GPU
    has it. The scaler multiplies the loss, to keep float16 gradients from underflowing; for other dtypes it does
    nothing."""
    if name == "auto" and device.type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    dtype = torch.float32 if name == "auto" else getattr(torch, name)
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def compile_model(model, wanted, device):
    """torch.compile(model) if wanted or, if that is None, on CUDA; else the model itself. If this machine cannot
    compile, a warning says so, and the model is returned as it is. The compiler is reset first: it is limited to a
    number of shapes, which all runs of a process share."""
    if not (device.type == "cuda" if wanted is None else wanted):
        return model
    torch.compiler.reset()
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))  # the smallest kernel needs all that the others need
    except Exception as error:
        reason = str(error).split("\n")[0]
        say(
            f"warning: torch.compile is off: {type(error).__name__}: {reason} If the machine has no C++ compiler or no "
            "Python.h, apt-get install g++ python3-dev; on CUDA it also needs triton and compute capability 7.0"
        )
        return model
    return torch.compile(model, dynamic=False)


def flash_attention():
    """A context for lengths that change: attention by any kernel but cuDNN's, which is preferred on Hopper and makes a
    plan for each new length, in 23 to 37 ms. Compiled code, whose lengths are fixed, runs without it."""
    kernels = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.OVERRIDEABLE
    return sdpa_kernel(list(kernels))


def to_device(tensors, device):
    """Copy to the device; to CUDA from pinned memory, so that the host runs ahead instead of waiting for the copy."""
    return [t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device) for t in tensors]
