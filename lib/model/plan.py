"""
What a run will take, computed before it starts: parameters, FLOPs, memory, disk, time, money. Needs no GPU and no data.
"""

import torch

GIB = 2**30
MEASURED = "one H200 reached in GPT-2 124M's step (bfloat16, compile, torch 2.11.0, 2026-11-22)"
MFU = 0.447
PEAKS = {"H100 or H200": 989e12, "A100": 312e12, "RTX 4090": 165e12}  # FLOP/s by datasheet, dense bfloat16
CARDS = (8, 16, 24, 40, 80, 141)  # GB of memory of common GPUs
ROOM = 0.92  # of a card's memory, without what CUDA and its libraries take


def count_parameters(model):
    """The parameters of a model, by part."""
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
    """Bytes that a compiled forward pass keeps for the backward in 16 bits: in each block 16 vectors of n_embd per
    token, one with checkpointing, and the logits once."""
    per_token = c.vocab_size + c.n_embd * (c.n_layer + 16 if checkpointing else 16 * c.n_layer)
    return 2 * per_token * sequences * c.sequence_length


def headline(c, model, devices, peak_tflops, dtype, compiled):
    """What a run prints at its start: model, devices and plan, with a warning if a CPU would take more than a day."""
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


def largest_micro_batch(c, n, room):
    """The largest power of two whose micro-batch fits into so many bytes of a GPU, as text."""
    for checkpointing in (False, True):
        sizes = [2**i for i in range(10) if c.sequence_length * 2**i <= c.total_batch_size]
        fit = [size for size in sizes if state_bytes(n) + activation_bytes(c, size, checkpointing) <= room]
        if fit:
            return f"{fit[-1]} sequences" + (" with activation checkpointing" if checkpointing else "")
    return "too small"


def duration(hours):
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def describe(c, model, data_tokens):
    """The plan of a run with the settings c as text; the model may be on the meta device. data_tokens: those of its
    training shards, None where they are not there yet.

    The formulas for memory give 26.2 and 14.2 GiB for GPT-2 124M with micro-batches of 64 and 32, where 26.6 and 14.4
    were measured on one H200.
    """
    parts = count_parameters(model)
    n, tokens = sum(parts.values()), c.max_steps * c.total_batch_size
    flops = model.flops_per_token(c.sequence_length)
    lines = [f"{name:30}{count:16,}" for name, count in {**parts, "parameters": n}.items()]
    steps = f"{c.max_steps:,} steps of {c.total_batch_size:,} tokens = {tokens:,} tokens"
    if data_tokens:
        steps += f", {tokens / data_tokens:.2f} epochs of the {data_tokens:,} in {c.data_dir}/"
    elif c.data_dir == "edu_fineweb10B":
        steps += f", {tokens / 1e10:.2f} epochs of the 10 billion of sample-10BT"
    lines += [
        "",
        f"{steps}, {tokens / n:.1f} per parameter",
        f"{flops:,} FLOP per token, {tokens * flops:.2e} in all: 6 per weight, and for the products of attention",
        "6 x layers x channels x length",
        "",
        f"the largest micro-batch that fits on a GPU, beside {state_bytes(n) / GIB:.1f} GiB of weights, gradients and",
        "moments, in 16 bits and compiled (computed):",
    ]
    cards = {f"{size} GB": size * 1e9 for size in CARDS}
    if torch.cuda.is_available():
        cards = {torch.cuda.get_device_name(): torch.cuda.get_device_properties(0).total_memory, **cards}
    lines += [f"  {name:36} {largest_micro_batch(c, n, ROOM * size)}" for name, size in cards.items()]
    keep = c.keep_checkpoints + 1  # a new one is written beside them
    speeds = {f"{gpu}, {peak * MFU / flops:,.0f} tokens/s": peak * MFU / flops for gpu, peak in PEAKS.items()}
    how = f"computed for an MFU of {MFU:.1%}, which {MEASURED}"
    if c.plan_speed:
        speeds, how = {f"{c.plan_speed:,} tokens/s": c.plan_speed}, "at the speed given"
    lines += [
        "",
        f"disk: 2 GB per billion tokens of shards (sample-10BT: 20 GB); {keep} checkpoints of {12 * n / 1e9:.2f} GB",
        "",
        f"time for {tokens:,} tokens, {how}",
        "(evaluation comes on top):",
    ]
    for name, speed in speeds.items():
        hours = tokens / speed / 3600
        price = f", {hours * c.plan_price:,.2f} at {c.plan_price:g} an hour" if c.plan_price else ""
        lines.append(f"  {name:36} 1 GPU {duration(hours)}{price}; 8 GPUs, scaling perfectly, {duration(hours / 8)}")
    if not c.plan_price:
        lines.append("--plan_price 2.50 adds what it costs at your price for an hour of one GPU")
    return "\n".join(lines)
