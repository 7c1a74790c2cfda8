"""
What a run will take, computed before it starts: parameters, operations, memory, disk, hours. No GPU and no data needed.
"""

import torch

GIB = 2**30
MEASURED = "one H200 reached in GPT-2 124M's step (bfloat16, compile, torch 2.11.0, 2026-11-22)"
MFU = 0.447
PEAKS = {"A100": 312e12, "H100 or H200": 989e12}  # FLOP/s, dense bfloat16


def count_parameters(model):
    """The parameters of a model by part, as a person would look for them."""
    parts = {"blocks": 0, "token embeddings and head": 0, "position embeddings": 0, "the rest": 0}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        part = {"h": "blocks", "wte": "token embeddings and head", "wpe": "position embeddings"}
        parts[part.get(words[min(1, len(words) - 1)], "the rest")] += parameter.numel()
    return {name: count for name, count in parts.items() if count}


def state_bytes(n):
    """Bytes on each GPU: weights, gradients, AdamW's moments in float32, and autocast's 16-bit copy of the weights."""
    return (16 + 2) * n


def activation_bytes(c, sequences, checkpointing=False):
    """What a forward keeps for its backward in 16 bits, compiled: in each block 16 vectors of n_embd a token, with
    checkpointing one, and the logits once."""
    per_token = c.vocab_size + c.n_embd * (c.n_layer + 16 if checkpointing else 16 * c.n_layer)
    return 2 * per_token * sequences * c.sequence_length


def headline(c, model, devices, peak_tflops, dtype, compiled):
    """What a run says at its start: the model, the devices, and the plan in a line, with a warning where a CPU would
    take more than a day."""
    tokens, n = c.max_steps * c.total_batch_size, sum(p.numel() for p in model.parameters())
    flops = tokens * model.flops_per_token(c.sequence_length)
    lines = [
        f"GPT-2, {n:,} parameters, on {devices}, {dtype}, compile {'on' if compiled else 'off'}, "
        f"torch {torch.__version__}",
        f"plan: {c.max_steps:,} steps x {c.total_batch_size:,} = {tokens:,} tokens, {tokens / n:.1f} per parameter, "
        f"{flops:.2e} FLOP; a checkpoint takes {12 * n / 1e9:.2f} GB",
    ]
    if peak_tflops:
        lines.append(f"MFU is 6N + 6LCT FLOP per token over {peak_tflops} TFLOP/s (datasheet)")
    if "CPU" in devices and flops > 1e17:
        lines.append("warning: this takes a CPU a day or more; no GPU? see nvidia-smi, or try --preset demo")
    if c.warmup_steps > c.max_steps > 0:
        lines.append(
            f"warning: the warm-up of {c.warmup_steps} steps is longer than the run of {c.max_steps}, whose learning "
            f"rate ends at {c.max_lr * c.max_steps / c.warmup_steps:.1e}, not {c.max_lr:.1e}: give "
            f"--warmup_steps {max(1, c.max_steps // 20)}"
        )
    return "\n".join(lines)


def describe(c, model):
    """The plan of a run with the settings c as text; the model may be on the meta device.

    The formulas for memory give 26.2 and 14.2 GiB for GPT-2 124M with micro-batches of 64 and 32, where 26.6 and 14.4
    were measured on one H200.
    """
    parts = count_parameters(model)
    n, tokens = sum(parts.values()), c.max_steps * c.total_batch_size
    flops = model.flops_per_token(c.sequence_length)
    lines = [f"{name:30}{count:16,}" for name, count in {**parts, "parameters": n}.items()]
    lines += [
        "",
        f"{c.max_steps:,} steps of {c.total_batch_size:,} tokens = {tokens:,} tokens, {tokens / n:.1f} per parameter",
        f"{flops:,} FLOP a token (6N + 6LCT), {tokens * flops:.2e} in all",
        "",
        "memory of each GPU, 16 bits and compile on:",
        f"  weights, gradients, moments {state_bytes(n) / GIB:10.1f} GiB",
    ]
    for checkpointing in (False, True):
        sizes = [2**i for i in range(8) if c.sequence_length * 2**i <= c.total_batch_size]
        memory = [(state_bytes(n) + activation_bytes(c, size, checkpointing)) / GIB for size in sizes]
        name = "with activation checkpointing" if checkpointing else "in all"
        lines.append(
            f"  {name}, micro-batch of " + ", ".join(f"{s}: {m:.1f}" for s, m in zip(sizes, memory, strict=True))
        )
    keep = c.keep_checkpoints + 1  # a new one is written beside them
    lines += [
        "",
        f"disk: 2 GB a billion tokens in shards (sample-10BT: 20 GB); {keep} checkpoints of {12 * n / 1e9:.2f} GB",
        "",
        f"hours for {tokens:,} tokens"
        + (" at the speed given" if c.plan_speed else f", if MFU is {MFU:.1%}, which {MEASURED}")
        + ":",
    ]
    speeds = {f"{c.plan_speed:,} tokens/s": c.plan_speed} if c.plan_speed else {}
    speeds = speeds or {f"{gpu}, {peak * MFU / flops:,.0f} tokens/s": peak * MFU / flops for gpu, peak in PEAKS.items()}
    for name, speed in speeds.items():
        hours = tokens / speed / 3600
        lines.append(f"  {name:36} 1 GPU {hours:10,.1f}     8 GPUs, if none waits {hours / 8:10,.1f}")
    return "\n".join(lines)
