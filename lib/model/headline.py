"""
What a run prints at its start.
"""

import torch

from lib.device import attention_kernel, name_of, peak_tflops


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
