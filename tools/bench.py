"""
What each optimization buys on this machine: one training step, one optimization more in every row. No data needed.

    python -m tools.bench --json bench.json --plot bench.png       # the ladder, the peer and HellaSwag

A row trains the same model on the same random tokens: forward, backward, clipping, AdamW. The peer is Hugging Face's
GPT-2 in the same loop, its steps alternating with ours. Times are medians; MFU counts 6N + 6LCT operations a token over
the datasheet's 16-bit peak. The shape is GPT-2 124M on CUDA and the demo's on CPU.
"""

import argparse
import contextlib
import gc
import json
import math
import random
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

import hellaswag
from tools.machine import PEAK_TFLOPS
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig

CUDA_ONLY = ("TF32", "bfloat16", "compile")
LADDER = ("plain float32", *CUDA_ONLY, "flash attention", "padded vocabulary", "fused AdamW", "no logits kept")


def plain_attention(q, k, v, is_causal):
    """softmax(q k^T / sqrt(hs)) v by the book, with the (T, T) matrix in memory."""
    future = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.transpose(-2, -1) / q.size(-1) ** 0.5).masked_fill(future, float("-inf")).softmax(dim=-1) @ v


class Trainer:
    """A model and its optimizer with the optimizations `on`; step() trains on one micro-batch of random tokens."""

    def __init__(self, device, config, B, on, peer=False):
        torch.manual_seed(0)
        self.device, self.B, self.T, self.on = device, B, config.sequence_length, on
        sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
        sizes["vocab_size"] = 50304 if "padded vocabulary" in on else 50257
        if peer:
            from transformers import GPT2Config, GPT2LMHeadModel

            sizes |= {"n_positions": self.T, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            model = GPT2LMHeadModel(GPT2Config(use_cache=False, attn_implementation="sdpa", **sizes))
            self.loss = lambda x, y: self.model(input_ids=x, labels=x).loss
        else:
            model = GPT(GPTConfig(self.T, **sizes))
            self.flops = model.flops_per_token()
            self.loss = lambda x, y: self.model(x, y, return_logits="no logits kept" not in on)[1]
        model.to(device)
        self.model = torch.compile(model, dynamic=False) if "compile" in on else model
        self.optimizer = GPT.configure_optimizers(model, 0.1, 6e-4, device.type)
        if "fused AdamW" not in on:
            for group in self.optimizer.param_groups:
                group.update(fused=False, foreach=False)

    def step(self):
        """Returns the seconds that it took."""
        tokens = torch.randint(50257, (self.B, self.T + 1), device=self.device)
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        attention = F.scaled_dot_product_attention if "flash attention" in self.on else plain_attention
        torch.set_float32_matmul_precision("high" if "TF32" in self.on else "highest")
        start = time.perf_counter()
        with mock.patch.object(F, "scaled_dot_product_attention", attention):
            with torch.autocast(self.device.type, torch.bfloat16, enabled="bfloat16" in self.on):
                loss = self.loss(x, y)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()  # waits for the device
        return time.perf_counter() - start


def measure(trainers, steps, warmup=3):
    """Let the trainers take steps in turn; returns the median seconds of each."""
    seconds = [[trainer.step() for trainer in trainers] for _ in range(warmup + steps)][warmup:]
    return [statistics.median(column) for column in zip(*seconds, strict=True)]


def climb(device, config, B, steps, names, peak):
    rows = []
    for i, name in enumerate(names):
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer = Trainer(device, config, B, names[: i + 1])
        (seconds,) = measure([trainer], steps)
        row = {"row": name, "ms": seconds * 1e3, "tokens_per_second": B * config.sequence_length / seconds}
        row["speedup"] = rows[-1]["ms"] / row["ms"] if rows else 1.0
        if device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            row["mfu"] = row["tokens_per_second"] * trainer.flops / ((peak or math.nan) * 1e12)
        print(f"{name:18}" + "".join(f" {key} {value:,.2f} " for key, value in row.items() if key != "row"), flush=True)
        rows.append(row)
    return rows


def hellaswag_speed(device, config, count):
    """Seconds for 100 items of HellaSwag's lengths, in random words: one item at a time, and batched."""
    choose, words = random.Random(0), ("the", "man", "is", "on", "with", "then", "runs", "water")
    texts = (" ".join(choose.choices(words, k=choose.randint(10, 40))) for _ in range(5 * count))
    items = [{"ctx": text, "label": 0, "endings": [next(texts) for _ in range(4)]} for text in texts]
    model = GPT(GPTConfig(1024, 50304, config.n_layer, config.n_head, config.n_embd)).to(device)
    seconds = {}
    for name, size in (("one_by_one", 1), ("batched", 32)):
        batches = hellaswag.make_batches(items, batch_size=size)
        hellaswag.evaluate(model, batches[:2], device)
        start = time.perf_counter()
        hellaswag.evaluate(model, batches, device).tolist()
        seconds[name] = (time.perf_counter() - start) / count * 100
    print("HellaSwag, seconds for 100 items:", seconds)
    return seconds


def main():
    parser = argparse.ArgumentParser(description="Measure what each optimization buys", allow_abbrev=False)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a row (default: %(default)s)")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--plot", help="draw the ladder into this PNG")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TrainConfig(**PRESETS["gpt2" if device.type == "cuda" else "demo"])
    names = [name for name in LADDER if device.type == "cuda" or name not in CUDA_ONLY]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in gpu), None)
    figures = {"device": gpu, "torch": torch.__version__, "peak_tflops": peak, "batch": args.batch}
    print(figures, flush=True)
    figures["ladder"] = climb(device, config, args.batch, args.steps, names, peak)
    with contextlib.suppress(ImportError):  # transformers is not needed for anything else here
        pair = [Trainer(device, config, args.batch, names, peer) for peer in (False, True)]
        ours, theirs = measure(pair, args.steps)
        figures["peer"] = {"ours_ms": ours * 1e3, "transformers_ms": theirs * 1e3, "ratio": theirs / ours}
        print("transformers, with the same settings:", figures["peer"])
    figures["hellaswag"] = hellaswag_speed(device, config, 2000 if device.type == "cuda" else 100)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    if args.plot:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
        axes.barh(names[::-1], [row["tokens_per_second"] for row in reversed(figures["ladder"])])
        axes.set(xlabel="tokens/s", title=f"One optimization more in every row ({gpu}, torch {torch.__version__})")
        figure.savefig(args.plot, dpi=150)


if __name__ == "__main__":
    main()
