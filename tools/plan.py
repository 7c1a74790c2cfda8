"""
What a run needs, computed before it starts: parameters, FLOPs, memory, disk, time, money. Needs no GPU and no data.

    python -m tools.plan --preset gpt2-medium
    python -m tools.plan --speed 553000 --price 2.50 --max_steps 38146

Every setting of train_gpt2.py is a flag here, too.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))  # python tools/plan.py works, too
from lib.config import check, parse_args
from lib.console import UserError, run_as_command, say
from lib.data.folder import ShardFolder
from lib.device import PEAK_TFLOPS
from lib.model.load import OPENAI_MODELS, on_meta
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig

PARTS = {".h.": "blocks", "wte": "token embeddings and head", "wpe": "position embeddings"}
MEASURED = "one H200 reached in GPT-2 124M's step (bfloat16, compile, torch 2.11.0, 2026-11-22)"
MFU = 0.447
GPUS = ("H200", "H100", "A100", "RTX 4090")
CARDS = (8, 16, 24, 40, 80, 141)  # GB of memory of common GPUs
ROOM = 0.92  # of a card's memory, without what CUDA and its libraries need


@dataclass
class PlanConfig(TrainConfig):
    speed: int = 0  # tokens/s of one GPU, as a trial run prints; 0: computed for common GPUs
    price: float = 0.0  # of one GPU for an hour, in any currency; 0: no prices


def count_parameters(model):
    """The parameters of a model, by part."""
    parts = {}
    for name, parameter in model.named_parameters():
        part = next((part for word, part in PARTS.items() if word in name), "the rest")
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def state_bytes(n):
    """Bytes on each GPU: weights, gradients, AdamW's moments in float32, and autocast's 16-bit copy of the weights."""
    return (16 + 2) * n


def activation_bytes(c, sequences, checkpointing=False):
    """Bytes that a compiled forward pass keeps for the backward in 16 bits: in each block 16 vectors of n_embd per
    token, one with checkpointing, and the logits once."""
    per_token = c.vocab_size + c.n_embd * (c.n_layer + 16 if checkpointing else 16 * c.n_layer)
    return 2 * per_token * sequences * c.sequence_length


def largest_micro_batch(c, n, room):
    """The largest power of two whose micro-batch fits into this many bytes of a GPU, as text."""
    for checkpointing in (False, True):
        sizes = [2**i for i in range(10) if c.sequence_length * 2**i <= c.total_batch_size]
        fit = [size for size in sizes if state_bytes(n) + activation_bytes(c, size, checkpointing) <= room]
        if fit:
            return f"{fit[-1]} sequences" + (" with activation checkpointing" if checkpointing else "")
    return "too small"


def duration(hours):
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def count_tokens(data_dir):
    """The number of training tokens in a folder of shards, None if there are none."""
    try:
        return sum(shard.length for shard in ShardFolder(data_dir, ["train"]).shards["train"])
    except UserError:
        return None


def describe(c, model, data_tokens):
    """The plan of a run with the settings c, a PlanConfig, as text; the model may be on the meta device. data_tokens:
    those of its training shards, None if there are no shards yet.

    The formulas for memory give 26.2 and 14.2 GiB for GPT-2 124M with micro-batches of 64 and 32; 26.6 and 14.4 were
    measured on one H200.
    """
    parts = count_parameters(model)
    n = sum(parts.values())
    tokens = c.max_steps * c.total_batch_size
    flops = model.flops_per_token(c.sequence_length)
    epochs = f", {tokens / data_tokens:.2f} epochs of the {data_tokens:,} in {c.data_dir}/" if data_tokens else ""
    lines = [f"{name:30}{count:16,}" for name, count in {**parts, "parameters": n}.items()]
    lines += [
        "",
        f"{c.max_steps:,} steps of {c.total_batch_size:,} tokens = {tokens:,} tokens{epochs}, "
        f"{tokens / n:.1f} per parameter",
        f"{flops:,} FLOP per token, {tokens * flops:.2e} in all: 6 per weight, and for the products of attention",
        "6 x layers x channels x length",
        "",
        f"the largest micro-batch that fits on a GPU, beside {state_bytes(n) / 2**30:.1f} GiB of weights, gradients",
        "and moments, in 16 bits and compiled (computed):",
    ]
    lines += [f"  {f'{size} GB':36} {largest_micro_batch(c, n, ROOM * size * 1e9)}" for size in CARDS]
    keep = c.keep_checkpoints + 1  # a new one is written beside them
    speeds = {gpu: PEAK_TFLOPS[gpu] * 1e12 * MFU / flops for gpu in GPUS}
    how = f"computed for an MFU of {MFU:.1%}, which {MEASURED}"
    if c.speed:
        speeds = {"": c.speed}
        how = "at the speed given"
    lines += [
        "",
        f"disk: 2 GB per billion tokens of shards (sample-10BT: 20 GB); {keep} checkpoints of {12 * n / 1e9:.2f} GB",
        "",
        f"time for {tokens:,} tokens, {how}",
        "(evaluation comes on top):",
    ]
    for gpu, speed in speeds.items():
        hours = tokens / speed / 3600
        price = f", {hours * c.price:,.2f} at {c.price:g} per hour" if c.price else ""
        name = f"{gpu}, {speed:,.0f} tokens/s".removeprefix(", ")
        lines.append(f"  {name:36} 1 GPU {duration(hours)}{price}; 8 GPUs, scaling perfectly, {duration(hours / 8)}")
    if not c.price:
        lines.append("--price 2.50 adds the cost at your price per hour of one GPU")
    return "\n".join(lines)


def main(c):
    c = check(c, 1, OPENAI_MODELS)
    if not (c.speed >= 0 and c.price >= 0):  # also rejects NaN
        raise UserError(f"speed is {c.speed} and price is {c.price}: both must be 0 or more")
    say(describe(c, on_meta(GPT, GPTConfig.of(c)), count_tokens(c.data_dir)))


if __name__ == "__main__":
    run_as_command(main, parse_args(PlanConfig, PRESETS, __doc__.strip().split("\n")[0], sys.argv[1:]))
