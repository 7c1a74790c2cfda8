"""
What each optimization gains on this machine: a training step, with one more optimization in every row. No data needed.

    python -m tools.bench

Every row trains the same model on the same random tokens: forward, backward, clipping, AdamW. If transformers is
installed, its GPT-2 follows, with the optimizations of the last row. Times are medians; MFU counts 6N + 6LCT operations
per token over the datasheet's 16-bit peak. The shape is GPT-2 124M on CUDA and the demo's on CPU.
"""

import argparse
import contextlib
import statistics
import sys
import timeit
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parent.parent))  # python tools/bench.py works, too
from lib.console import run_as_command, say
from lib.device import mfu, name_of, precision
from lib.model.cpu_loss import chunked_cross_entropy
from lib.tokenizer import VOCAB_SIZE
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig

CUDA_ONLY = ("TF32", "16 bits", "compile")  # 16 bits: bfloat16, or float16 on GPUs without it
LADDER = ("plain float32", *CUDA_ONLY, "flash attention", "padded vocabulary", "fused AdamW", "no logits kept")


def plain_attention(q, k, v, is_causal):
    """softmax(q k^T / sqrt(hs)) v by the book, with the (T, T) matrix in memory."""
    future = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.transpose(-2, -1) / q.size(-1) ** 0.5).masked_fill(future, float("-inf")).softmax(dim=-1) @ v


class Trainer:
    """A model and its optimizer with the optimizations `on`; peer: it is the GPT-2 of transformers."""

    def __init__(self, device, config, on, vocab_size=None, peer=False):
        torch.manual_seed(0)
        self.device = device
        self.on = on
        sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
        sizes["vocab_size"] = vocab_size or (50304 if "padded vocabulary" in on else VOCAB_SIZE)
        model = GPT(GPTConfig(config.sequence_length, **sizes))
        self.flops = model.flops_per_token()
        self.loss = lambda x, y: self.model(x, y, return_logits="no logits kept" not in on)[1]
        if device.type == "cpu":
            model.fast_loss = chunked_cross_entropy  # takes effect if no logits are kept
        if peer:
            from transformers import GPT2Config, GPT2LMHeadModel

            sizes |= {"n_positions": config.sequence_length, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            model = GPT2LMHeadModel(GPT2Config(use_cache=False, **sizes))
            self.loss = lambda x, y: self.model(input_ids=x, labels=x).loss
        model.to(device)
        self.model = torch.compile(model, dynamic=False) if "compile" in on else model
        self.optimizer = GPT.configure_optimizers(model, 0.1, 6e-4, device.type)
        if "fused AdamW" not in on:
            for group in self.optimizer.param_groups:
                group.update(fused=False, foreach=False)

    def step(self, x, y):
        """Train on one micro-batch. Returns the loss."""
        attention = F.scaled_dot_product_attention if "flash attention" in self.on else plain_attention
        autocast = precision("auto", self.device)[0] if "16 bits" in self.on else contextlib.nullcontext
        torch.set_float32_matmul_precision("high" if "TF32" in self.on else "highest")
        with mock.patch.object(F, "scaled_dot_product_attention", attention):
            with autocast():
                loss = self.loss(x, y)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()  # waits for the device


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure what each optimization gains", allow_abbrev=False)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step (default: %(default)s)")
    batch = parser.parse_args(argv).batch
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TrainConfig(**PRESETS["gpt2" if device.type == "cuda" else "demo"])
    tokens = torch.randint(VOCAB_SIZE, (batch, config.sequence_length + 1), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    say(f"{name_of(device)}, torch {torch.__version__}, {batch} x {config.sequence_length} tokens per step")
    names = [name for name in LADDER if device.type == "cuda" or name not in CUDA_ONLY]
    rows = [(name, names[: i + 1]) for i, name in enumerate(names)]
    above = None
    for name, on in rows + [("transformers", names)] * bool(find_spec("transformers")):
        torch.compiler.reset()  # it is limited to a number of models
        trainer = Trainer(device, config, on, peer=name == "transformers")
        times = timeit.repeat(partial(trainer.step, x, y), number=1, repeat=13)
        seconds = statistics.median(times[3:])  # without the first ones, which warm up
        speed = batch * config.sequence_length / seconds
        peak = mfu(speed * trainer.flops, device)
        end = f", MFU {peak:.1%}" if peak else ""
        ratio = (above or seconds) / seconds
        say(f"{name:18} {1000 * seconds:8.1f} ms  {speed:10,.0f} tokens/s  x {ratio:.2f} the row above{end}")
        above = seconds


if __name__ == "__main__":
    run_as_command(main)
