"""
The rehearsal of a run: what it is, whether a faster loss computes the same, and the largest micro-batch that fits in
memory.
"""

import contextlib
import gc
import math
import os
import re
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from lib.console import UserError, print0
from lib.device import attention_kernel, name_of, peak_tflops
from lib.distributed import sum_over_ranks, wait_for_all
from lib.model.cpu_loss import CHUNK, fast_loss
from lib.optimizers import make_moments, parts_of, state_like

SPARE = 64 << 20  # bytes of a GPU that are left free for kernels that are loaded later


def headline(c, model, device, world_size, autocast, compiled):
    """The model, the devices and the size of a run with the settings c, and a warning if the warm-up is longer."""
    with autocast():
        is_16_bit = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_16_bit else torch.float32
    n = sum(p.numel() for p in model.parameters())
    tokens = c.max_steps * c.total_batch_size
    flops = tokens * model.flops_per_token(c.sequence_length)
    kernel = ""
    if device.type == "cuda":  # where one can be several times as fast as another
        kernel = f", {attention_kernel(c.n_head, c.sequence_length, c.n_embd // c.n_head, dtype, device)}"
    lines = [
        f"GPT-2, {n:,} parameters, on {world_size} x {name_of(device)}, {dtype}, "
        f"compile {'on' if compiled else 'off'}{kernel}, torch {torch.__version__}",
        f"plan: {c.max_steps:,} steps x {c.total_batch_size:,} = {tokens:,} tokens, {tokens / n:.1f} per parameter, "
        f"{flops:.2e} FLOP; a checkpoint takes {12 * n / 1e9:.2f} GB",
    ]
    if peak := peak_tflops(name_of(device)):
        lines.append(f"MFU is 6N + 6LCT FLOP per token over {peak} TFLOP/s (datasheet)")
    if getattr(c, "warmup_steps", 0) > c.max_steps > 0:
        lines.append(
            f"warning: the warm-up of {c.warmup_steps} steps is longer than the run of {c.max_steps}, whose learning "
            f"rate ends at {c.max_lr * c.max_steps / c.warmup_steps:.1e}, not {c.max_lr:.1e}: lower --warmup_steps"
        )
    return "\n".join(lines)


def cgroup_rooms():
    """Yield the bytes left in each of this process's control groups (version 2), from its own to the outermost."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        own = Path("/sys/fs/cgroup") / line.removeprefix("0::").lstrip("/")
        for group in [own, *own.parents] if line.startswith("0::") else []:
            limit = group / "memory.max"
            if limit.exists() and (most := limit.read_text().strip()) != "max":
                cache = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)
                yield int(most) - int((group / "memory.current").read_text()) + int(cache[1] if cache else 0)


def free_memory():
    """The bytes that this process can still take before Linux kills it; infinity if unknown."""
    try:
        free = [1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]), *cgroup_rooms()]
    except (OSError, TypeError, ValueError):  # not Linux, or an unknown one
        return math.inf
    return min(free) / int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def cpu_bytes(gpt, tokens, checkpointing, fresh):
    """Estimate the bytes that a micro-batch of this many tokens takes on a CPU in float32, beside the weights; fresh:
    with AdamW's moments, of which no page has been written yet. A block keeps 16 vectors of n_embd per token, with
    checkpointing one; the backward takes as much as one block, gradients of the tied matrix and a chunk of logits."""
    c, n = gpt.config, sum(p.numel() for p in gpt.parameters())
    logits = CHUNK if gpt.fast_loss else 3 * tokens  # rows in memory at a time
    vectors = (c.n_layer + 32) if checkpointing else 16 * (c.n_layer + 1)
    return 4 * (n * (3 if fresh else 1) + vectors * tokens * c.n_embd + c.vocab_size * (4 * c.n_embd + logits))


def try_step(ddp, optimizer, B, T, autocast, micro_steps=2, also=None):
    """Allocate the most that a run needs: micro-batches of B x T tokens, the second beside the gradients of the first;
    one of validation, whose float32 logits can take more than all activations of a small model; and what also()
    needs."""
    is_ddp = isinstance(ddp, DistributedDataParallel)
    model = ddp.module if is_ddp else ddp
    device = next(model.parameters()).device
    spare = torch.empty(SPARE if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    state = state_like(optimizer)
    x = torch.arange(B * T, device=device).remainder(model.config.vocab_size).view(B, T)
    y = x.clone()  # one tensor as both arguments would be compiled separately
    with getattr(ddp, "no_sync", contextlib.nullcontext)():  # ranks may fail at different sizes
        for _ in range(micro_steps):
            with autocast():
                _, loss = ddp(x, y, return_logits=False)
            loss.backward()
    ddp.zero_grad(set_to_none=not is_ddp)
    model.eval()
    with torch.no_grad(), autocast():
        model(x, y, return_logits=False)
        if also:
            also()
    model.train()
    del spare, state


@contextlib.contextmanager
def restored(model):
    """Restore the model's buffers, which some forwards move, and torch's random states."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for name, value in before.items():
                if model.get_buffer(name).shape == value.shape:
                    model.get_buffer(name).copy_(value)
                else:  # it has grown
                    owner, _, own_name = name.rpartition(".")
                    setattr(model.get_submodule(owner), own_name, value)


@torch.no_grad()
def check_head(model):
    """Warn if forward() changes the logits after head(), which samples and HellaSwag call alone."""
    device = next(model.parameters()).device
    idx = torch.arange(min(8, model.config.block_size, model.config.vocab_size), device=device)[None]
    model.eval()
    logits = model(idx)[0]
    alone = model.head(model.hidden_states(idx))
    model.train()
    if not torch.allclose(logits, alone, rtol=1e-6, atol=0, equal_nan=True):
        print0("warning: forward() changes the logits after head(), which samples and HellaSwag call: change it there")


def warm_up(model, device):
    """Two synchronized backwards of one token, not compiled, in which cuBLAS allocates its memory and DDP orders its
    buckets. From the second on each .grad is a view of a bucket; earlier gradients would be a second copy."""
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    for _ in range(2):
        with torch.compiler.set_stance("force_eager"):
            model(token, token, return_logits=False)[1].backward()
        model.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))


def fit_in_memory(attempt, size, total, recompute, device):
    """Return the first (size, note for the user) with which attempt(size, recompute) fits on all ranks: the size given,
    else the largest power of two that divides total; with activation checkpointing if recompute, or, if that is None,
    only if nothing fits without. Raises UserError if nothing fits at all.
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
            wait_for_all()  # compiling takes one rank longer than another
            if sum_over_ranks(torch.tensor(short, device=device)).item() == 0:
                why = [f"reduced from {size}: out of memory"] if n < size else []
                why += ["activation checkpointing on"] if checkpointing else []
                return n, f" ({'; '.join(why)})" if why else ""
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if "torch._dynamo" in sys.modules:
                torch.compiler.reset()  # the compiler has a limit on shapes
    raise UserError(f"not even a micro-batch of {n} fits in memory: choose a smaller model or sequence_length")


def rehearse(config, model, ddp, optimizer, autocast, device, world_size, data, also):
    """Try out a run before step 0, and print what it is. Sets the model's fast_loss, if it computes the same as
    forward(); returns the size of the micro-batches: config's, or less if that does not fit in memory on every rank
    beside the model and its optimizer. It divides the sequences of a rank in a step. `ddp` is `model`, or wraps it.

    also: computes, in eval mode, what a run on a GPU needs memory for besides training and validation. Weights, buffers
    and random states do not change.
    """
    T = config.sequence_length
    share = config.total_batch_size // (T * world_size)  # sequences of each rank in a step
    is_ddp = isinstance(ddp, DistributedDataParallel)
    is_fresh = not any(part.state for part in parts_of(optimizer))
    is_compiled = (ddp.module if is_ddp else ddp) is not model
    print0(headline(config, model, device, world_size, autocast, is_compiled))
    model.fast_loss = fast_loss(model, data.shards["train"][0].read(0, T + 1))
    make_moments(optimizer)

    def attempt(size, recompute):
        model.activation_checkpointing = recompute
        if device.type == "cpu":  # Linux grants every allocation and kills the process when it is written to
            needed, free = cpu_bytes(model, size * T, recompute, is_fresh), free_memory()
            if needed > free / 4:
                verdict = ": too much" if needed > free else ""
                print0(f"micro-batches of {size} x {T}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} free{verdict}")
            if needed > free:
                raise RuntimeError("out of memory")
        try:
            try_step(ddp, optimizer, size, T, autocast, min(2, share // size), also if device.type == "cuda" else None)
        finally:
            ddp.zero_grad(set_to_none=not is_ddp)
            if device.type == "cuda" and hasattr(torch.accelerator, "empty_host_cache"):  # torch 2.11 has no such call
                torch.accelerator.empty_host_cache()  # autotuning copies in-place inputs to pinned host memory

    with restored(model):
        check_head(model)
        if is_ddp or device.type == "cuda":
            warm_up(ddp, device)
        B = min(getattr(config, "micro_batch_size", share), share)
        size, why = fit_in_memory(attempt, B, share, getattr(config, "activation_checkpointing", None), device)
    batch = f"micro-batches of {size} x {T}, {share // size} per rank{why}"
    print0(f"steps of {config.total_batch_size:,} tokens: {batch}")
    return size
