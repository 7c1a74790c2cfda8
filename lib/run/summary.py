"""The results of a run: a few lines for the console, and a page to share."""

import math
import time

import torch

from lib.files import atomic_write
from lib.run.code import short


def results(metrics, clock, parameters, timed_from):
    """Rows of (what, value). timed_from: the tokens that were trained on before timing started."""
    tokens = metrics["tokens"]
    hours = clock.total() / 3600
    rows = [("parameters", f"{parameters:,}"), ("tokens", f"{tokens:,} in {metrics['step']:,} steps")]
    if clock["training"]:
        speed = (tokens - timed_from) / clock["training"]
        duration = f"{hours:.2f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        rows.append(("time", f"{duration}, {speed:,.0f} tokens/s in training"))
    if metrics.get("val_loss") is not None:
        loss = metrics["val_loss"]
        rows.append(("validation loss", f"{loss:.4f}, perplexity {math.exp(min(loss, 700)):,.1f}"))
    if "hella" in metrics:
        rows.append(("HellaSwag acc_norm", f"{metrics['hella']:.4f}"))
    return rows


def write_page(folder, title, rows, changed, commit):
    """Write summary.md into the folder of a run: results, curves, samples, and the changed settings as text."""
    rows = [*rows, ("code", f"{short(commit)}, torch {torch.__version__}"), ("date", time.strftime("%Y-%m-%d"))]
    lines = [f"# {title}", "", "| | |", "|---|---|", *[f"| {what} | {value} |" for what, value in rows], ""]
    if (folder / "curve.png").exists():
        lines += ["![Losses over tokens](curve.png)", ""]
    lines += ["## Settings that are not the defaults", "", "```", *changed, "```", ""]
    samples = folder / "samples.txt"
    if samples.exists():
        lines += ["## Samples, by step", "", "```", samples.read_text(encoding="utf-8").rstrip("\n"), "```", ""]
    with atomic_write(folder / "summary.md") as file:
        file.write("\n".join(lines).encode())
