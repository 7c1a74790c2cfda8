"""
What each optimization gains on this machine: a training step, with one more optimization in every row. No data needed.

    python -m tools.bench --json bench.json --plot bench.png

Every row trains the same model on the same random tokens: forward, backward, clipping, AdamW. Its steps alternate with
those of the row above, so that their ratio holds even if the machine's speed drifts. Then follow all optimizations
against none from the same weights, Hugging Face's GPT-2 in the same loop, and HellaSwag batched against one item at a
time. Times are medians; MFU counts 6N + 6LCT operations per token over the datasheet's 16-bit peak. The shape is GPT-2
124M on CUDA and the demo's on CPU.
"""

import argparse
import contextlib
import json
import random
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import hellaswag
from lib.console import UserError, run_as_command
from lib.device import flash_attention, name_and_peak
from lib.files import expand
from lib.model.memory import fit_in_memory
from lib.tokenizer import VOCAB_SIZE
from tools.ladder import CUDA_ONLY, LADDER, Trainer, measure, measure_ladder
from train_gpt2 import GPT, PRESETS, GPTConfig, TrainConfig, choose_dtype


def one_at_a_time(model, item, device):
    """The tutorial's way: four rows, with logits for all tokens. Returns the ending with the lowest mean loss."""
    _, tokens, mask, _ = hellaswag.render_example(item)
    tokens, mask = tokens.to(device), mask.to(device)[:, 1:]
    with flash_attention():  # as hellaswag.py
        logits = model(tokens)[0][:, :-1, :VOCAB_SIZE].float()
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(mask.shape)
    return ((losses * mask).sum(dim=1) / mask.sum(dim=1)).argmin().item()


@torch.no_grad()
def hellaswag_speed(device, config, count):
    """Seconds for `count` items of HellaSwag's lengths, made of random words, and how many answers agree."""
    choose, words = random.Random(0), ("the", "man", "is", "on", "with", "then", "runs", "water")

    def text(shortest, longest):
        return " ".join(choose.choices(words, k=choose.randint(shortest, longest)))

    items = [{"ctx": text(20, 80), "label": 0, "endings": [text(10, 50) for _ in range(4)]} for _ in range(count)]
    model = GPT(GPTConfig(1024, 50304, config.n_layer, config.n_head, config.n_embd)).to(device).eval()
    with torch.autocast(device.type, choose_dtype("auto", device), enabled=device.type == "cuda"):
        one_at_a_time(model, items[0], device)
        start = time.perf_counter()
        answers = [one_at_a_time(model, item, device) for item in items]
        single, start = time.perf_counter() - start, time.perf_counter()
        labelled = [{**item, "label": answer} for item, answer in zip(items, answers, strict=True)]
        _, agree, _ = hellaswag.evaluate(model, hellaswag.make_batches(labelled), device).tolist()
        batched = time.perf_counter() - start
    return {"items": count, "one_by_one_s": single, "batched_s": batched, "ratio": single / batched, "agree": agree}


def plain_step(device, config, batch):
    """The first row of the ladder, which takes the most memory."""
    tokens = torch.zeros(batch, config.sequence_length, dtype=torch.long, device=device)
    Trainer(device, config, LADDER[:1]).step(tokens, tokens)


def draw_plot(path, figures):
    import matplotlib.pyplot as plt

    rows = figures["ladder"][::-1]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 1), layout="constrained")
    bars = axes.barh([row["row"] for row in rows], [row["tokens_per_second"] for row in rows])
    axes.bar_label(bars, [f" x {row['speedup']:.2f}" for row in rows])
    axes.margins(x=0.1)
    axes.set(xlabel="tokens/s; beside the bar: speedup over the row above, steps alternating")
    axes.set(title=f"One more optimization in every row ({figures['device']}, {figures['torch']})")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description="Measure what each optimization gains", allow_abbrev=False)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step, at most (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a row (default: %(default)s)")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--plot", help="draw the ladder into this PNG")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TrainConfig(**PRESETS["gpt2" if device.type == "cuda" else "demo"])
    names = [name for name in LADDER if device.type == "cuda" or name not in CUDA_ONLY]
    torch._dynamo.config.recompile_limit = 64
    name, peak = name_and_peak(device)
    batch, _ = fit_in_memory(lambda n, _: plain_step(device, config, n), args.batch, args.batch, False, device)
    figures = {"device": name, "torch": f"torch {torch.__version__}", "peak_tflops": peak, "batch": batch}
    print(figures, flush=True)
    generator, tokens = torch.Generator(device).manual_seed(0), batch * config.sequence_length

    def draw():
        """Random tokens, a few of them frequent, as in text, so that there is something to learn."""
        shape = batch, config.sequence_length + 1
        rows = (torch.rand(shape, generator=generator, device=device) ** 8 * VOCAB_SIZE).long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    figures["ladder"] = measure_ladder(device, config, draw, tokens, args.steps, names, peak)
    pair = [Trainer(device, config, on, vocab_size=50304) for on in (names[:1], names)]
    (plain, ours), difference = measure(pair, draw, 5 * args.steps)
    figures["all_rows"] = {"plain_ms": plain * 1e3, "ours_ms": ours * 1e3, "ratio": plain / ours}
    figures["all_rows"] |= {"steps": 5 * args.steps, "largest_loss_difference": difference}
    print("all rows against none:", figures["all_rows"], flush=True)
    with contextlib.suppress(ImportError):  # transformers is not needed for anything else here
        pair = [Trainer(device, config, names, peer=peer) for peer in (False, True)]
        (ours, theirs), _ = measure(pair, draw, args.steps)
        figures["peer"] = {"ours_ms": ours * 1e3, "transformers_ms": theirs * 1e3, "ratio": theirs / ours}
        print("transformers with the same settings:", figures["peer"], flush=True)
    figures["hellaswag"] = hellaswag_speed(device, config, args.steps * (200 if device.type == "cuda" else 20))
    print("HellaSwag, batched against one item at a time:", figures["hellaswag"])
    try:
        if args.json:
            Path(expand(args.json)).write_text(json.dumps(figures, indent=1) + "\n")
        if args.plot:
            draw_plot(expand(args.plot), figures)
    except (OSError, ValueError) as error:  # ValueError: not a picture format
        raise UserError(f"cannot write the figures, which are printed above: {error}") from None


if __name__ == "__main__":
    run_as_command(main)
