"""
Draw the curves of runs over the tokens they have seen, beside published results for models of their size.

    python -m tools.plot log                                        # writes curve.png
    python -m tools.plot log other_log/log.txt --out both.png

log.txt counts steps. The tokens of a step, the size of the model and its data come from config.json beside it. The loss
has a wide panel with its last part enlarged, HellaSwag a second one; each other kind of record has a small one below.
"""

import argparse
import contextlib
import csv
import json
import os
import sys
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parent.parent))  # python tools/plot.py works, too
from lib.console import UserError, run_as_command, say
from lib.files import ROOT, atomic_write, expand
from lib.run.log import RECORD, lines_of

TITLES = {  # of the first panels, by kind of record; the panel of any other kind has the kind as its title
    "val": "loss, nats per token", "hella": "HellaSwag, acc_norm", "lr": "learning rate", "norm": "gradient norm",
}  # fmt: skip
WIDE = {"val": "val_loss", "hella": "hellaswag_acc_norm"}  # with their columns in assets/reference_runs.csv
FEW = 20  # up to this many records of a kind are marked with points, since the line between them was not measured
UNITS = {1e9: "billions of tokens", 1e6: "millions of tokens", 1e3: "thousands of tokens", 1: "tokens"}
SIZES = {(12, 768): "124M", (24, 1024): "350M", (36, 1280): "774M", (48, 1600): "1558M"}  # by n_layer and n_embd


def read_log(path):
    """{kind: {step: value}} of a log.txt, of every kind whose values are numbers. If its steps go back, because a
    second run follows, the earlier records from that step on are dropped. Raises UserError if there are no records."""
    try:
        lines = lines_of(path)[:-1]  # the last one is incomplete
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. Give the log.txt of a run, or its log_dir") from None
    records = {}
    last = strange = 0
    for line in lines:
        try:
            step, kind, value = RECORD.fullmatch(line).groups()
            step, kind, value = int(step), kind.decode(), float(value)
        except (AttributeError, ValueError):
            strange += 1
            continue
        if step < last:
            say(f"warning: {path} goes back from step {last} to {step}: the later records are used")
            kept = {kind: {s: v for s, v in old.items() if s < step} for kind, old in records.items()}
            records = {kind: old for kind, old in kept.items() if old}
        records.setdefault(kind, {})[step] = value
        last = step
    if strange:
        say(f"warning: {path} has {strange} lines that are not records: skipped")
    if not records:
        raise UserError(f"{path} has no records, which are lines like 250 val 6.2907")
    return records


def read_run(name, tokens_per_step):
    """The run of a log.txt or log_dir, with its settings from config.json, which tokens_per_step overrides."""
    path = Path(expand(name))
    path = Path(os.path.realpath(path / "log.txt" if os.path.isdir(path) else path))
    records = read_log(path)
    config = {}
    with contextlib.suppress(OSError, ValueError, TypeError):  # none, or another program's
        config = {**json.loads(path.with_name("config.json").read_bytes())}
    batch = config.get("total_batch_size") if tokens_per_step is None else tokens_per_step
    if not isinstance(batch, int) or batch < 1:
        raise UserError(
            f"{path} has no config.json beside it that says how many tokens a step has: give --tokens_per_step, the "
            "total_batch_size of the run, 1 or more"
        )
    name = path.parent.name if path.name == "log.txt" else path.name
    name = name.replace("$", r"\$")  # to matplotlib, $ begins a formula
    tokens = records.pop("tokens", {})
    return SimpleNamespace(name=name, path=path, records=records, tokens=tokens, tokens_per_step=batch, config=config)


def tokens_at(run, steps):
    """The tokens that a run was trained on before these steps, an array. If its batch has changed on the way, log.txt
    has them at every validation from there on, and those of the steps between are interpolated."""
    batch = run.tokens_per_step
    known = {0: 0}
    if run.tokens:
        known |= {step: step * batch for step in run.records.get("val", {})} | run.tokens
    known_steps, tokens = zip(*sorted(known.items()), strict=True)
    return np.interp(steps, known_steps, tokens) + batch * np.maximum(steps - known_steps[-1], 0)


def smooth(values):
    """The mean of the finite values around each one: up to a fiftieth of the curve to either side, less at its start,
    where it falls."""
    halves = np.minimum(np.arange(len(values)), len(values) // 50)
    parts = [values[i - half : i + half + 1] for i, half in enumerate(halves)]
    parts = [part[np.isfinite(part)] for part in parts]
    return np.array([part.mean() if len(part) else np.nan for part in parts])


def curves_of_run(run, color):
    """Yield the curves of a run: (panel, tokens, values, style) each."""
    for kind, records in run.records.items():
        steps, values = np.array(sorted(records.items()), dtype=float).T
        tokens = tokens_at(run, steps)
        panel = "val" if kind == "train" else kind
        label = run.name + {"train": ", training", "val": ", validation"}.get(kind, "")
        line = {"color": color, "label": label, "linewidth": 1.6, "zorder": 3}
        if kind in ("train", "norm"):  # noisy: the smoothed curve over the records
            yield panel, tokens, values, {"color": color, "linewidth": 0.5, "alpha": 0.3}
            values = smooth(values)
            line |= {"linewidth": 0.8, "zorder": 2}
        yield panel, tokens, values, line


def published(config, end):
    """Yield the same of published runs of the size of a run with this config, from assets/reference_runs.csv, which
    names their sources; no losses on other data. A model whose training is not published is a line up to `end`."""
    if config.get("init_from") != "scratch":  # the loss of a run from other weights says nothing beside them
        return
    size = SIZES.get((config.get("n_layer"), config.get("n_embd")))
    folder = Path(str(config.get("data_dir"))).name
    with open(ROOT / "assets" / "reference_runs.csv") as file:
        rows = [row for row in csv.DictReader(line for line in file if line[0] != "#") if size in row["run"].split()]
    for i, (name, group) in enumerate(groupby(rows, key=lambda row: row["run"])):
        group = [*group]
        data = group[0]["dataset"]  # "" if it is not known
        is_same = not data or ("fineweb" in folder and ("edu" in folder) == ("edu" in data))
        for panel in WIDE if is_same else ["hella"]:
            points = [(row["tokens"], row[WIDE[panel]]) for row in group if row[WIDE[panel]]]
            style = {"color": f"{0.3 + 0.2 * (i % 3):.1f}", "linewidth": 1.2, "label": name}
            if points and not points[0][0]:
                points = [(tokens, points[0][1]) for tokens in (0, end)]
                style["linestyle"] = ":"
            if points:
                yield panel, *np.array(points, dtype=float).T, style


def plot_curves(axes, curves, end, unit):
    """Plot curves up to `end` tokens, with their last values in the labels. Returns what is seen, (tokens, values)."""
    seen = []
    for tokens, values, style in curves:
        inside = np.isfinite(values) & (tokens <= end)
        marker = "." if inside.sum() <= FEW and style.get("linestyle") != ":" else None
        if "label" in style:
            last = f"{values[inside][-1]:.4f}" if inside.any() else "nan"
            style = {**style, "label": f"{last}  {style['label']}"}
        axes.plot(tokens[tokens <= end] / unit, values[tokens <= end], marker=marker, **style)
        seen.append((tokens[inside], values[inside]))
    axes.grid(alpha=0.3)
    return tuple(np.concatenate(parts) for parts in zip(*seen, strict=True))


def enlarge_the_end(axes, curves, seen, end, unit):
    """Show the last part of falling curves, too flat to be read beside their beginning, in the empty corner above."""
    tokens, values = seen
    late = values[tokens > 0.15 * end]
    if len(late) < 3 or late.max() - values.min() >= 0.45 * np.ptp(values):
        return  # there is no empty corner
    inset = axes.inset_axes([0.24, 0.5, 0.74, 0.46])
    plot_curves(inset, curves, end, unit)
    margin = 0.05 * np.ptp(late) or 0.1
    inset.set(xlim=(0.15 * end / unit, end / unit), ylim=(late.min() - margin, late.max() + margin))
    inset.tick_params(labelsize="small")


def list_beside(axes):
    """A legend at the right of the axes, in the order of the last values, with which the labels begin."""
    named = zip(*axes.get_legend_handles_labels(), strict=True)
    named = sorted(named, key=lambda item: -float(item[1].split()[0]))
    axes.legend(*zip(*named, strict=True), loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def lay_out(figure, wide, small):
    """The axes of so many wide panels, the first one high, and of small ones, up to three in a row, below them."""
    heights = [5.0, 2.5][:wide]
    rows = [len(row) for row in np.array_split(range(small), -(-small // 3))] if small else []
    sizes = [sum(heights), *[2.5] * len(rows)]
    figure.set_size_inches(12, sum(sizes))
    top, *below = figure.subfigures(len(sizes), 1, height_ratios=sizes, squeeze=False)[:, 0]
    places = [*top.subplots(wide, 1, height_ratios=heights, sharex=True, squeeze=False)[:, 0]]
    for part, count in zip(below, rows, strict=True):
        places += [*part.subplots(1, count, squeeze=False)[0]]
    return places


def draw(runs, out):
    """Draw runs, of read_run, and published ones of the first one's size into a picture."""
    curves = [curve for i, run in enumerate(runs) for curve in curves_of_run(run, f"C{i % 10}")]
    steps = {run.tokens_per_step for run in runs}
    end = max(tokens.max() for _, tokens, _, _ in curves) or max(steps)
    curves += published(runs[0].config, end)
    unit = next(unit for unit in UNITS if unit <= end)
    found = {curve[0] for curve in curves}
    panels = [panel for panel in TITLES if panel in found] + sorted(found - TITLES.keys())
    wide = [panel for panel in panels if panel in WIDE] or panels[:1]
    rest = [panel for panel in panels if panel not in wide]
    figure = Figure(dpi=100, layout="constrained")
    places = lay_out(figure, len(wide), len(rest))
    for axes, panel in zip(places, wide + rest, strict=True):
        of_panel = [curve[1:] for curve in curves if curve[0] == panel]
        seen = plot_curves(axes, of_panel, end, unit)
        last = f": {seen[1][-1]:.3g}" if panel in rest and len(runs) == 1 and len(seen[1]) else ""
        axes.set_title(TITLES.get(panel, panel.replace("$", r"\$")) + last)
        axes.set_xlim(-0.005 * end / unit, end / unit)
        if panel in wide:
            list_beside(axes)
        if panel == "val":
            enlarge_the_end(axes, of_panel, seen, end, unit)
    for axes in places[len(wide) - 1 :]:
        axes.set_xlabel(UNITS[unit])
    if len(steps) == 1 and not any(run.tokens for run in runs):
        tokens_per_step = max(steps)
        functions = (lambda x: x * unit / tokens_per_step, lambda x: x * tokens_per_step / unit)
        places[0].secondary_xaxis("top", functions=functions).set_xlabel(f"steps of {tokens_per_step:,} tokens")
    save(figure, out)


def save(figure, out):
    """Write a picture, in the format of the suffix. Raises UserError if that fails."""
    try:
        with atomic_write(out) as file:
            figure.savefig(file, format=Path(out).suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out}: {error}") from None
    say(f"drawn: {out}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw the curves of runs", allow_abbrev=False)
    parser.add_argument("logs", nargs="+", metavar="LOG", help="a log.txt, or the log_dir that holds one")
    parser.add_argument("--out", default="curve.png", help="a .png, .pdf or .svg file (default: %(default)s)")
    parser.add_argument("--tokens_per_step", type=int, help="of every LOG (default: from config.json beside it)")
    args = parser.parse_args(argv)
    runs = [read_run(log, args.tokens_per_step) for log in args.logs]
    for run in [run for run in runs if [other.name for other in runs].count(run.name) > 1]:
        run.name = str(run.path)
    draw(runs, expand(args.out))


if __name__ == "__main__":
    run_as_command(main)
