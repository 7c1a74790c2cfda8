"""
The largest micro-batch that fits in memory, found by a rehearsal before the first step.
"""

import contextlib
import gc
import sys

import torch
from torch.nn.parallel import DistributedDataParallel

from lib.console import UserError
from lib.distributed import sum_over_ranks
from lib.optimizers import make_moments, missing_state

SPARE = 64 << 20  # bytes of a GPU that a run does not plan with: kernels that are loaded later take their own room


def rehearse(model, optimizer, B, T, vocab_size, device, autocast, count=2, also=None):
    """Allocate what a run needs at most: `count` micro-batches of B x T tokens, the second beside the gradients of the
    first, one of validation, whose float32 logits can take more than all activations of a small model, and what also()
    takes. Neither weights nor random state change."""
    is_ddp = isinstance(model, DistributedDataParallel)
    spare = torch.empty(SPARE if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    state = missing_state(optimizer)
    x = torch.arange(B * T, device=device).remainder(vocab_size).view(B, T)
    y = x.clone()  # one tensor in two places would be compiled for by itself
    with getattr(model, "no_sync", contextlib.nullcontext)():  # ranks need not agree here on what fits
        for _ in range(count):
            with autocast():
                _, loss = model(x, y, return_logits=False)
            loss.backward()
    optimizer.zero_grad(set_to_none=not is_ddp)
    alone = model.module if is_ddp else model
    alone.eval()
    with torch.no_grad(), autocast():
        alone(x, y, return_logits=False)
        if also:
            also()
    alone.train()
    del spare, state


def warm_up(model, device):
    """Two synchronized backwards of one token, not compiled, by which cuBLAS takes its memory and DDP puts its buckets
    in order. From the second on each .grad is a view of them; gradients from before would lie beside, a second copy."""
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    for _ in range(2):
        model.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))
        with torch.compiler.set_stance("force_eager"):
            model(token, token, return_logits=False)[1].backward()


def fit_in_memory(attempt, size, total, recompute, device):
    """Return the first (size, what to say of it) with which attempt(size, recompute) fits on all ranks: the size given,
    else the largest power of two that divides total; with activation checkpointing if recompute, or, where that is
    None, if nothing fits without. Raises UserError where nothing fits at all.
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
    raise UserError(f"not even a micro-batch of {n} fits in memory: choose a smaller model or sequence_length")


def fit_micro_batch(gpt, model, optimizer, B, sequences, T, activation_checkpointing, autocast, device, also=None):
    """Return (the micro-batch size to use, what to say of it): B, or less where that does not fit beside the model and
    its optimizer on every rank. It divides `sequences`, those of a rank in a step. `model` is `gpt`, or wraps it.
    also: computes, in eval mode, what a run on a GPU needs memory for besides training and validation."""

    is_ddp = isinstance(model, DistributedDataParallel)
    make_moments(optimizer)
    if is_ddp or device.type == "cuda":
        warm_up(model, device)

    def attempt(size, recompute):
        gpt.activation_checkpointing = recompute
        try:
            micro_steps, more = min(2, sequences // size), also if device.type == "cuda" else None
            rehearse(model, optimizer, size, T, gpt.config.vocab_size, device, autocast, micro_steps, more)
        finally:
            optimizer.zero_grad(set_to_none=not is_ddp)
            if device.type == "cuda":  # the compiler timed kernels that overwrite the logits, with a copy on the host
                torch._C._host_emptyCache()

    return fit_in_memory(attempt, min(B, sequences), sequences, activation_checkpointing, device)
