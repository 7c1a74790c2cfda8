"""The device of a rank, its name and peak, and its compiler."""

import functools
import os
import re

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib.console import UserError, say

# dense 16-bit matrix products with 32-bit sums by datasheet, TFLOP/s, keyed by a part of the device's name, the longer
# one first; a GeForce from the 30 series on does twice its float32
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "GH200": 989, "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835,
    "H100": 989, "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A40": 150, "A10G": 70, "A10": 125,
    "RTX A6000": 155, "RTX 6000 Ada": 364, "V100": 125, "T4": 65,
    "RTX 5090": 209, "RTX 5080": 113, "RTX 5070 Ti": 88, "RTX 5070": 62,
    "RTX 4090": 165, "RTX 4080 SUPER": 104, "RTX 4080": 97, "RTX 4070 Ti SUPER": 88, "RTX 4070 Ti": 80,
    "RTX 4070 SUPER": 71, "RTX 4070": 58, "RTX 3090 Ti": 80, "RTX 3090": 71, "RTX 3080 Ti": 68, "RTX 3080": 60,
    "RTX 3070": 41, "RTX 3060 Ti": 32, "RTX 3060": 25,
}  # fmt: skip

# tokens/s of one GPU that trains GPT-2 124M: T=1024, 16 bits, compiled; and whose figure it is
SPEEDS = {
    "H200": (553_000, "measured: torch 2.11.0, 2026-11-22"),
    "H100": (513_000, "computed: an H200 with 3.35 instead of 4.8 TB/s"),
    "A100": (182_000, "published: 90 ms for 16,384 tokens in the lecture"),
    "RTX 4090": (130_000, "published: the tutorial's code, build-nanogpt issue 6"),
}


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
        raise UserError(f"cannot use device {name!r}: {str(error):.200}. Choose cuda, mps or cpu") from None


def choose_device(name, local_rank, in_group):
    """The device of a rank, by a type or "auto". Raises UserError if it is not available."""
    if name == "auto":
        name = "cpu" if default_device() == "mps" and in_group else default_device()
    if name == "mps" and in_group:
        raise UserError("torchrun's ranks cannot use an Apple GPU, on which gloo cannot sum: use --device cpu")
    if {"cuda": torch.cuda, "mps": torch.backends.mps}.get(name, torch.cpu).is_available() is False:
        raise UserError(f"device is {name}, but torch sees no such GPU: check nvidia-smi, or use --device cpu")
    return claim_gpu(local_rank) if name == "cuda" else torch.device(name)


def claim_gpu(local_rank):
    """Make this rank's GPU the current one and return it. Raises UserError if this machine has more ranks than GPUs.
    Unless the user has configured PyTorch's allocator, it is set to map memory page by page: with fixed segments, the
    gaps between tensors add up to a third of GPT-2 124M's memory."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or local_rank + 1)
    gpus = torch.cuda.device_count()
    if ranks > gpus:
        raise UserError(
            f"torchrun started {ranks} ranks on this machine, but torch sees {gpus} GPUs: give it --nproc_per_node="
            f"{gpus}, or check CUDA_VISIBLE_DEVICES"
        )
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # read at the first CUDA call
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


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
    """torch.compile(model) if wanted or, if that is None, on CUDA; else, or with a warning if this machine cannot
    compile, the model itself. The compiler is reset first: it is limited to a number of shapes per process."""
    if not (device.type == "cuda" if wanted is None else wanted):
        return model
    torch.compiler.reset()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a * b + c rounded once; triton will change its default
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))  # the smallest kernel needs all that the others need
    except Exception as error:
        say(f"warning: torch.compile is off; it may need apt-get install g++ python3-dev: {error!r:.300}")
        return model
    return torch.compile(model, dynamic=False)


def attention_kernel(n_head, T, head_size, dtype, device):
    """The name of the kernel with which torch trains causal attention of this shape, such as cudnn_attention."""
    q = torch.empty(1, n_head, T, head_size, dtype=dtype, device=device, requires_grad=True)
    return SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name.lower()


def flash_attention():
    """Attention for lengths that change: any kernel but cuDNN's, which on Hopper plans each new one in 23 to 37 ms."""
    kernels = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.OVERRIDEABLE
    return sdpa_kernel(list(kernels))


def to_device(tensors, device):
    """Copy to the device; to CUDA from pinned memory, so that the host runs ahead instead of waiting for the copy."""
    return [t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device) for t in tensors]
