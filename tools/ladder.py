"""
The ladder of tools/bench.py: the training step from plain float32 on, with one more optimization in every row.
"""

import gc
import statistics
import time
from unittest import mock

import torch
from torch.nn import functional as F

from lib.tokenizer import VOCAB_SIZE
from train_gpt2 import GPT, GPTConfig, choose_dtype

CUDA_ONLY = ("TF32", "16 bits", "compile")  # 16 bits: bfloat16, or float16 on GPUs without it
LADDER = ("plain float32", *CUDA_ONLY, "flash attention", "padded vocabulary", "fused AdamW", "no logits kept")


def plain_attention(q, k, v, is_causal):
    """softmax(q k^T / sqrt(hs)) v by the book, with the (T, T) matrix in memory."""
    future = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.transpose(-2, -1) / q.size(-1) ** 0.5).masked_fill(future, float("-inf")).softmax(dim=-1) @ v


class Trainer:
    """A model and its optimizer with the optimizations `on`; step(x, y) trains on one micro-batch."""

    def __init__(self, device, config, on, vocab_size=None, peer=False):
        torch.manual_seed(0)
        self.device, self.on = device, on
        sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
        sizes["vocab_size"] = vocab_size or (50304 if "padded vocabulary" in on else VOCAB_SIZE)
        if peer:
            from transformers import GPT2Config, GPT2LMHeadModel

            sizes |= {"n_positions": config.sequence_length, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            model = GPT2LMHeadModel(GPT2Config(use_cache=False, attn_implementation="sdpa", **sizes))
            self.loss = lambda x, y: self.model(input_ids=x, labels=x).loss
        else:
            model = GPT(GPTConfig(config.sequence_length, **sizes))
            self.flops = model.flops_per_token()
            self.loss = lambda x, y: self.model(x, y, return_logits="no logits kept" not in on)[1]
        model.to(device)
        self.model = torch.compile(model, dynamic=False) if "compile" in on else model
        self.optimizer = GPT.configure_optimizers(model, 0.1, 6e-4, device.type)
        if "fused AdamW" not in on:
            for group in self.optimizer.param_groups:
                group.update(fused=False, foreach=False)

    def step(self, x, y):
        """Returns (seconds, loss)."""
        attention = F.scaled_dot_product_attention if "flash attention" in self.on else plain_attention
        torch.set_float32_matmul_precision("high" if "TF32" in self.on else "highest")
        start = time.perf_counter()
        with mock.patch.object(F, "scaled_dot_product_attention", attention):
            with torch.autocast(self.device.type, choose_dtype("auto", self.device), enabled="16 bits" in self.on):
                loss = self.loss(x, y)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss = loss.item()  # waits for the device
        return time.perf_counter() - start, loss


def measure(trainers, draw, steps):
    """Step the trainers in turn. Returns (the median seconds of each, the largest difference of their losses)."""
    seconds, difference, warmup = [], 0.0, min(3, steps)
    for _ in range(warmup + steps):
        batch = draw()
        times, losses = zip(*(trainer.step(*batch) for trainer in trainers), strict=True)
        seconds.append(times)
        difference = max(difference, max(losses) - min(losses))
    return [statistics.median(column) for column in zip(*seconds[warmup:], strict=True)], difference


def measure_ladder(device, config, draw, tokens, steps, names, peak):
    rows, above = [], None
    for i, name in enumerate(names):
        gc.collect()
        if device.type == "cuda":
            base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        trainer = Trainer(device, config, names[: i + 1])
        trainer.step(*draw())
        trainer.step(*draw())
        row = {"row": name}
        if device.type == "cuda":
            row["peak_gib"] = (torch.cuda.max_memory_allocated() - base) / 2**30
        (*before, seconds), _ = measure([above, trainer] if above else [trainer], draw, steps)
        row |= {"ms": seconds * 1e3, "tokens_per_second": tokens / seconds}
        if peak:
            row["mfu"] = tokens / seconds * trainer.flops / (peak * 1e12)
        row["speedup"] = before[0] / seconds if above else 1.0
        row["speedup_in_all"] = row["speedup"] * (rows[-1]["speedup_in_all"] if rows else 1.0)
        print(f"{name:18}" + "".join(f" {key} {value:,.2f} " for key, value in row.items() if key != "row"), flush=True)
        rows.append(row)
        above = trainer
    return rows
