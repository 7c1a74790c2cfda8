"""
What a run needs, computed before it starts: parameters, FLOPs, memory, disk, time, money. Needs no GPU and no data.

    python -m tools.plan --preset gpt2-medium
    python -m tools.plan --speed 553000 --price 2.50 --max_steps 38146

Every setting of train_gpt2.py is a flag here, too.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))  # python tools/plan.py works, too
from lib.config import check, parse_args
from lib.console import UserError, run_as_command, say
from lib.data.folder import ShardFolder
from lib.device import SPEEDS
from lib.model.load import OPENAI_MODELS
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig

CARDS = (8, 16, 24, 40, 80, 141)  # GB of memory of common GPUs
ROOM = 0.92  # of a card's memory, without what CUDA and its libraries need
FLOPS_OF_124M = 798_759_936  # per token, of the model and the length whose speeds are known
STATE = 16 + 2  # bytes per parameter: weights, gradients, AdamW's moments in float32, autocast's 16-bit copy


@dataclass
class PlanConfig(TrainConfig):
    speed: int = 0  # tokens/s of one GPU, as a trial run prints; 0: computed for common GPUs
    price: float = 0.0  # of one GPU for an hour, in any currency


def activation_bytes(c, sequences, checkpointing=False):
    """Bytes that a compiled forward pass keeps for the backward in 16 bits: in each block 16 vectors of n_embd per
    token, one with checkpointing, and the logits once. With STATE this gives 26.2 and 14.2 GiB for GPT-2 124M and
    micro-batches of 64 and 32; 26.6 and 14.4 were measured on one H200."""
    per_token = c.vocab_size + c.n_embd * (c.n_layer + 16 if checkpointing else 16 * c.n_layer)
    return 2 * per_token * sequences * c.sequence_length


def largest_micro_batch(c, n, room):
    """The largest power of two whose micro-batch fits into this many bytes of a GPU, as text."""
    for checkpointing in (False, True):
        sizes = [2**i for i in range(10) if c.sequence_length * 2**i <= c.total_batch_size]
        fit = [size for size in sizes if STATE * n + activation_bytes(c, size, checkpointing) <= room]
        if fit:
            return f"{fit[-1]} sequences" + (" with activation checkpointing" if checkpointing else "")
    return "too small"


def count_tokens(data_dir):
    """The number of training tokens in a folder of shards, None if there are none."""
    try:
        return sum(shard.length for shard in ShardFolder(data_dir, ["train"]).shards["train"])
    except UserError:
        return None


def describe(c, model, data_tokens):
    """The plan of a run with the settings c, a PlanConfig; data_tokens: in its training shards, None without shards."""
    n = sum(p.numel() for p in model.parameters())
    tokens = c.max_steps * c.total_batch_size
    flops = model.flops_per_token(c.sequence_length)
    epochs = f", {tokens / data_tokens:.2f} epochs of the {data_tokens:,} in {c.data_dir}/" if data_tokens else ""
    lines = [
        f"{n:,} parameters, {flops:,} FLOP per token (6N + 6LCT)",
        f"{c.max_steps:,} steps of {c.total_batch_size:,} tokens = {tokens:,} tokens{epochs}, "
        f"{tokens / n:.1f} per parameter, {tokens * flops:.2e} FLOP",
        f"disk: 2 GB per billion tokens of shards (sample-10BT: 20 GB); {c.keep_checkpoints + 1} checkpoints of "
        f"{12 * n / 1e9:.2f} GB",
        f"memory: {STATE * n / 2**30:.1f} GiB of weights, gradients and moments; largest micro-batch beside them, "
        "in 16 bits and compiled (computed):",
    ]
    lines += [f"  {f'{size} GB':30} {largest_micro_batch(c, n, ROOM * size * 1e9)}" for size in CARDS]
    lines.append("time on one GPU, without evaluation; a model of another size at the same FLOP/s as 124M:")
    for gpu, (speed, source) in ({"as given": (c.speed, "")} if c.speed else SPEEDS).items():
        speed *= 1 if c.speed else FLOPS_OF_124M / flops
        hours = tokens / speed / 3600
        price = f", {hours * c.price:,.2f} at {c.price:g} per hour" if c.price else ""
        lines.append(f"  {f'{gpu}, {speed:,.0f} tokens/s':30} {hours:,.1f} hours{price}  {source}".rstrip())
    return "\n".join(lines)


def main(c):
    c = check(c, 1, OPENAI_MODELS)
    with torch.device("meta"):
        model = GPT(GPTConfig.of(c))
    say(describe(c, model, count_tokens(c.data_dir)))


if __name__ == "__main__":
    run_as_command(main, parse_args(PlanConfig, PRESETS, "What a run needs, computed before it starts", sys.argv[1:]))
