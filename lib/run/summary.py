"""
The results of a run: a few lines for the console, and a page to share, with the curves and the samples.
"""

import math
import re
import time
from dataclasses import fields

import torch

from lib.files import atomic_write


def results(metrics, clock, parameters, timed_from):
    """Rows of (what, value). timed_from: the tokens that were trained on before timing started."""
    tokens = metrics["tokens"]
    hours = clock.total() / 3600
    rows = [("parameters", f"{parameters:,}"), ("tokens", f"{tokens:,} in {metrics['step']:,} steps")]
    if clock["training"]:
        speed = (tokens - timed_from) / clock["training"]
        since = f" since token {timed_from:,}" if timed_from else ""
        duration = f"{hours:.2f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        rows.append(("time", f"{duration}{since}, {speed:,.0f} tokens/s in training"))
    if metrics.get("val_loss") is not None:
        loss = metrics["val_loss"]
        rows.append(("validation loss", f"{loss:.4f}, perplexity {math.exp(min(loss, 700)):,.1f}"))
    if "hella" in metrics:
        rows.append(("HellaSwag acc_norm", f"{metrics['hella']:.4f}"))
    return rows


def write_page(folder, title, rows, config, facts):
    """Write summary.md into the folder of a run: results, curves, changed settings, and the samples by step."""
    commit = re.sub(r"\+changes\.(\w+)", r" with uncommitted changes (\1)", facts["commit"])
    changed = [
        f"{field.name} = {getattr(config, field.name)!r}"
        for field in fields(config)
        if getattr(config, field.name) != field.default
    ]
    lines = [f"# {title}", "", "| | |", "|---|---|", *[f"| {what} | {value} |" for what, value in rows]]
    lines += [f"| code | {commit}, torch {torch.__version__} |", f"| date | {time.strftime('%Y-%m-%d')} |", ""]
    if (folder / "curve.png").exists():
        lines += ["![Losses over tokens](curve.png)", ""]
    lines += ["## Settings that are not the defaults", "", "```", *changed, "```", ""]
    samples = folder / "samples.txt"
    if samples.exists():
        lines += ["## Samples, by step", "", "```", samples.read_text(encoding="utf-8").rstrip("\n"), "```", ""]
    with atomic_write(folder / "summary.md") as file:
        file.write("\n".join(lines).encode())
