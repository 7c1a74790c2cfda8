"""
What each optimization gains on this machine: a training step, with one more optimization in every row. No data needed.

    python -m tools.bench --json bench.json --plot bench.png

Every row trains the same model on the same random tokens: forward, backward, clipping, AdamW. Its steps alternate with
those of the row above, so that their ratio holds even if the machine's speed drifts. Then follow all optimizations
against none from the same weights, and Hugging Face's GPT-2 in the same loop. Times are medians; MFU counts 6N + 6LCT
operations per token over the datasheet's 16-bit peak. The shape is GPT-2 124M on CUDA and the demo's on CPU.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parent.parent))  # python tools/bench.py works, too
from lib.console import UserError, run_as_command, say
from lib.device import name_of, peak_tflops
from lib.files import expand
from lib.tokenizer import VOCAB_SIZE
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig, choose_dtype

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
        torch.compiler.reset()  # it is limited to a number of models; the one above compiles again while warming up
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
        say(f"{name:18}" + "".join(f" {key} {value:,.2f} " for key, value in row.items() if key != "row"))
        rows.append(row)
        above = trainer
    return rows


def draw_plot(path, figures):
    from matplotlib.figure import Figure

    rows = figures["ladder"][::-1]
    figure = Figure(figsize=(8, 0.4 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([row["row"] for row in rows], [row["tokens_per_second"] for row in rows])
    axes.bar_label(bars, [f" x {row['speedup']:.2f}" for row in rows])
    axes.margins(x=0.1)
    axes.set(xlabel="tokens/s; beside the bar: speedup over the row above, steps alternating")
    axes.set(title=f"One more optimization in every row ({figures['device']}, {figures['torch']})")
    figure.savefig(path, dpi=150)


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TrainConfig(**PRESETS["gpt2" if device.type == "cuda" else "demo"])
    names = [name for name in LADDER if device.type == "cuda" or name not in CUDA_ONLY]
    name = name_of(device)
    peak = peak_tflops(name)
    figures = {"device": name, "torch": f"torch {torch.__version__}", "peak_tflops": peak, "batch": args.batch}
    say(figures)
    shape = (args.batch, config.sequence_length + 1)
    generator = torch.Generator(device).manual_seed(0)

    def draw():
        """Random tokens, a few of them frequent, as in text, so that there is something to learn."""
        rows = (torch.rand(shape, generator=generator, device=device) ** 8 * VOCAB_SIZE).long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    tokens = args.batch * config.sequence_length
    figures["ladder"] = measure_ladder(device, config, draw, tokens, args.steps, names, peak)
    pair = [Trainer(device, config, on, vocab_size=50304) for on in (names[:1], names)]
    (plain, ours), difference = measure(pair, draw, 5 * args.steps)
    figures["all_rows"] = {"plain_ms": plain * 1e3, "ours_ms": ours * 1e3, "ratio": plain / ours}
    figures["all_rows"] |= {"steps": 5 * args.steps, "largest_loss_difference": difference}
    say(f"all rows against none: {figures['all_rows']}")
    if find_spec("transformers"):  # not needed for anything else here
        pair = [Trainer(device, config, names, peer=peer) for peer in (False, True)]
        (ours, theirs), _ = measure(pair, draw, args.steps)
        figures["peer"] = {"ours_ms": ours * 1e3, "transformers_ms": theirs * 1e3, "ratio": theirs / ours}
        say(f"transformers with the same settings: {figures['peer']}")
    try:
        if args.json:
            Path(expand(args.json)).write_text(json.dumps(figures, indent=1) + "\n")
        if args.plot:
            draw_plot(expand(args.plot), figures)
    except (OSError, ValueError) as error:  # ValueError: not a picture format
        raise UserError(f"cannot write the figures, which are printed above: {error}") from None


def parse_args():
    parser = argparse.ArgumentParser(description="Measure what each optimization gains", allow_abbrev=False)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per row (default: %(default)s)")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--plot", help="draw the ladder into this PNG")
    return parser.parse_args()


if __name__ == "__main__":
    run_as_command(main, parse_args())
