"""
Try a model out without a trace.
"""

import contextlib

import torch

from lib.console import print0


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
    with restored(model):
        model.eval()
        logits = model(idx)[0]
        alone = model.head(model.hidden_states(idx))
        model.train()
    if not torch.allclose(logits, alone, rtol=1e-6, atol=0, equal_nan=True):
        print0("warning: forward() changes the logits after head(), which samples and HellaSwag call: change it there")
