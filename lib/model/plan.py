"""
What a run will take, computed before it starts: parameters, operations, memory, disk, hours. No GPU and no data needed.
"""

import torch

GIB = 2**30
MEASURED = "one H200 reached in GPT-2 124M's step (bfloat16, compile, torch 2.11.0, 2026-11-22)"
MFU = 0.447
PEAKS = {"A100": 312e12, "H100 or H200": 989e12}  # FLOP/s, dense bfloat16


def count_parameters(c):
    """The parameters of a GPT with the knobs c, by part."""
    matrices = 12 * c.n_embd**2  # 4 squares in attention, 8 in the MLP
    return {
        "token embeddings (and head)": c.vocab_size * c.n_embd,
        "position embeddings": c.sequence_length * c.n_embd,
        f"{c.n_layer} blocks": c.n_layer * (matrices + 13 * c.n_embd),  # 9 of them biases, 4 layer norms
        "last layer norm": 2 * c.n_embd,
    }


def flops_per_token(c):
    """6N + 6LCT, as GPT.flops_per_token."""
    n = sum(count_parameters(c).values()) - c.sequence_length * c.n_embd
    return 6 * n + 6 * c.n_layer * c.n_embd * c.sequence_length


def state_bytes(c):
    """Weights, gradients and two moments in float32, and autocast's copy of the weights in 16 bits, on each GPU."""
    return (16 + 2) * sum(count_parameters(c).values())


def activation_bytes(c, sequences, checkpointing=False):
    """What a forward keeps for its backward in 16 bits, compiled: in each block 16 vectors of n_embd a token, with
    checkpointing one, and the logits once."""
    per_token = c.vocab_size + c.n_embd * (c.n_layer + 16 if checkpointing else 16 * c.n_layer)
    return 2 * per_token * sequences * c.sequence_length


def memory_bytes(c, sequences, checkpointing=False):
    return state_bytes(c) + activation_bytes(c, sequences, checkpointing)


def headline(c, model, run, dtype, compiled):
    """What a run says at its start: the model, the machine, and the plan in a line, with a warning where no CPU would
    come to its end."""
    tokens, n = c.max_steps * c.total_batch_size, sum(p.numel() for p in model.parameters())
    flops = tokens * model.flops_per_token(c.sequence_length)
    lines = [
        f"GPT-2, {n:,} parameters, on {run.world_size} x {run.device_name}, {dtype}, "
        f"compile {'on' if compiled else 'off'}, torch {torch.__version__}",
        f"plan: {c.max_steps:,} steps x {c.total_batch_size:,} = {tokens:,} tokens, {tokens / n:.1f} a parameter, "
        f"{flops:.2e} FLOP; a checkpoint takes {12 * n / 1e9:.2f} GB",
    ]
    if run.peak_tflops:
        lines.append(f"MFU is 6N + 6LCT a token over {run.peak_tflops} TFLOP/s (datasheet)")
    if run.device.type == "cpu" and flops > 1e17:  # a day or more
        lines.append("warning: this takes a CPU a day or more; no GPU? see nvidia-smi, or try --preset demo")
    if c.warmup_steps > c.max_steps > 0:
        lines.append(
            f"warning: the warm-up of {c.warmup_steps} steps is longer than the run of {c.max_steps}, whose learning "
            f"rate ends at {c.max_lr * c.max_steps / c.warmup_steps:.1e}, not {c.max_lr:.1e}: give "
            f"--warmup_steps {max(1, c.max_steps // 20)}"
        )
    return "\n".join(lines)


def describe(c):
    """The plan of a run with the knobs c, as text. The formulas for memory give 26.2 and 14.2 GiB for GPT-2 124M with
    micro-batches of 64 and 32, where 26.6 and 14.4 were measured on one H200."""
    parts = count_parameters(c)
    n, tokens = sum(parts.values()), c.max_steps * c.total_batch_size
    flops = flops_per_token(c)
    lines = [f"{name:30}{count:16,}" for name, count in {**parts, "parameters": n}.items()]
    lines += [
        "",
        f"{c.max_steps:,} steps of {c.total_batch_size:,} tokens = {tokens:,} tokens, {tokens / n:.1f} a parameter",
        f"{flops:,} FLOP a token (6N + 6LCT), {tokens * flops:.2e} in all",
        "",
        "memory of each GPU, 16 bits and compile on:",
        f"  weights, gradients, moments {state_bytes(c) / GIB:10.1f} GiB",
    ]
    for checkpointing in (False, True):
        sizes = [2**i for i in range(8) if c.sequence_length * 2**i <= c.total_batch_size]
        memory = [memory_bytes(c, size, checkpointing) / GIB for size in sizes]
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
