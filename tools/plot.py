"""
Draw the curves of runs over the tokens they have seen, beside published results for models of their size.

    python -m tools.plot log                                        # writes curve.png
    python -m tools.plot log other_log/log.txt --out both.png
    python -m tools.plot --size 124M --dataset fineweb-edu          # the published runs alone, over log(tokens)

log.txt counts steps. The tokens of a step, the size of the model and its data come from a checkpoint beside it, or from
the flags. Each kind of record that is not about the loss or HellaSwag has a panel of its own below.
"""

import argparse
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from lib.console import UserError, run_as_command, say
from lib.files import atomic_write, expand
from lib.model.published import DATASETS, OTHER, SIZES, dataset_of, published, size_of
from lib.run.log import read_log

TITLES = {  # of the first panels, by kind of record; the panel of any other kind has the kind as its title
    "val": "loss, nats per token", "hella": "HellaSwag, acc_norm", "lr": "learning rate",
    "norm": "gradient norm, before clipping",
}  # fmt: skip
FEW = 200  # up to this many records of a kind are drawn as points, more as a line
UNITS = {1e9: "billions of tokens", 1e6: "millions of tokens", 1e3: "thousands of tokens", 1: "tokens"}


def read_checkpoint(log_dir):
    """Tokens of a step, size and dataset of the run whose checkpoints are in log_dir; None if none can be read."""
    import torch  # here, since it takes seconds, and the trainer gives the flags instead

    from lib.checkpoint import list_checkpoints

    for path in list_checkpoints(log_dir)[::-1]:
        try:  # with mmap the weights stay on the disk
            contents = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            size = size_of(SimpleNamespace(**contents["config"]))
            return contents["train_config"]["total_batch_size"], size, dataset_of(contents.get("data"))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, AttributeError):
            continue  # damaged, or another program's
    return None


def read_run(name, tokens_per_step, size, dataset):
    """The run of a log.txt or log_dir; arguments that are None come from a checkpoint."""
    path = Path(expand(name))
    path = path / "log.txt" if os.path.isdir(path) else path
    run = SimpleNamespace(records=read_log(path), path=Path(os.path.realpath(path)))
    name = run.path.parent.name if path.name == "log.txt" else path.name
    run.name = " " * name.startswith("_") + name.replace("$", r"\$")  # matplotlib gives _ and $ a meaning
    given = tokens_per_step, size, dataset
    found = (read_checkpoint(path.parent) if None in given else None) or (None, OTHER, OTHER)
    run.tokens_per_step, run.size, run.dataset = (f if g is None else g for g, f in zip(given, found, strict=True))
    if run.tokens_per_step is None:
        raise UserError(
            f"{path} has no checkpoint of train_gpt2.py beside it that says how many tokens a step has: give "
            "--tokens_per_step, the total_batch_size of the run (524288 by default)"
        )
    if run.tokens_per_step < 1:
        raise UserError(f"tokens_per_step is {run.tokens_per_step}: give the total_batch_size of the run, 1 or more")
    return run


def smooth(values):
    """The mean of the finite values around each one, a fiftieth of the curve to either side."""
    window, finite = np.ones(2 * (len(values) // 50) + 1), np.isfinite(values)
    total, count = (np.convolve(v, window, "same") for v in (np.where(finite, values, 0), finite))
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def curves_of_run(run, i=0, count=1):
    """Yield the curves of the i-th of several runs, (panel, tokens, values, style) each. Runs that agree stay visible:
    the earlier ones are wider, and the dashes of one lie in the gaps of the others."""
    color, gaps, after = f"C{i % 10}", 4 * max(1, count - 1), min(2, count - 1 - i)
    line = {"color": color, "linewidth": 1 + 2 * after, "alpha": 0.8}
    points = {"color": color, "linestyle": (4 * i, (4, gaps)), "linewidth": 1.2, "marker": "osD^v"[i % 5], "zorder": 3}
    points |= {"markersize": 4 + 2 * after, "markerfacecolor": "none"}
    for kind, records in run.records.items():
        tokens, values = np.array(sorted(records.items()), dtype=float).reshape(-1, 2).T
        tokens *= run.tokens_per_step
        panel = "val" if kind == "train" else kind
        label = run.name + {"train": ", training", "val": ", validation"}.get(kind, "")
        if kind != "train" and len(values) <= FEW:
            yield panel, tokens, values, {**points, "label": label}
        elif kind == "lr":
            yield panel, tokens, values, {**line, "label": label}
        else:
            yield panel, tokens, values, {"color": color, "linewidth": 0.5, "alpha": 0.25}
            yield panel, tokens, smooth(values), {**line, "label": label}


def curves_of_peer(peer, color, end):
    """The same of a published run or model; a model whose training is not published is a line up to `end`."""
    for kind in ("val", "hella"):
        points = getattr(peer, kind)
        if points and points[0][0] is None:
            points = [(tokens, points[0][1]) for tokens in (0, end)]
        if points:
            style = ":" if points[0][1] == points[-1][1] else "-"
            yield kind, *np.array(points).T, {"color": color, "linestyle": style, "linewidth": 1.2, "label": peer.name}


def with_last_value(style, values, panel):
    """The style of a curve, with the last of its visible values in the label."""
    if "label" not in style or not len(values):
        return style
    return {**style, "label": f"{style['label']}: {values[-1]:{'.4f' if panel in ('val', 'hella') else '.3g'}}"}


def draw_panel(axes, panel, curves, end, unit):
    """Draw the curves of a panel, (tokens, values, style) each, up to `end` tokens."""
    # the loss falls so far in the first twentieth that the curves after it could not be told apart
    start, early, inside = end / 20 if panel in ("val", "norm") else 0, [], []
    for tokens, values, style in curves:
        axes.plot(tokens / unit, values, **with_last_value(style, values[tokens <= end], panel))
        seen = np.isfinite(values) & (tokens <= end)
        early.extend(values[seen & (tokens < start)])
        inside.extend(values[seen & (tokens >= start)])
    low, high = (limit(inside or early or [0]) for limit in (min, max))
    margin = 0.04 * (high - low) or 0.1
    axes.set(ylim=(low - margin, high + margin), xlim=(0, end / unit), xlabel=UNITS[unit])
    axes.set_title(TITLES.get(panel, panel.replace("$", r"\$")))
    axes.legend(loc="upper right" if panel == "val" else "best", fontsize="small")
    axes.grid(alpha=0.3)


def add_steps(axes, unit, tokens_per_step):
    """Add an axis on top that counts steps, with the scale that the first one has at that time."""
    functions = (lambda x: x * unit / tokens_per_step, lambda x: x * tokens_per_step / unit)
    top = axes.secondary_xaxis("top", functions=functions)
    top.set_xlabel(f"steps of {tokens_per_step:,} tokens")
    return top


def show_beginning(axes, curves, first, end, unit, tokens_per_step):
    """Use log(tokens) from `first` on, and print the values at some steps, so that a run can be compared early."""
    axes.set(xscale="log", xlim=(first / unit, end / unit))
    top = add_steps(axes, unit, tokens_per_step)
    for axis, of_axis in ((axes.xaxis, unit), (top.xaxis, tokens_per_step)):
        ticks = [n * 10.0**k for k in range(-3, 9) for n in (1, 2, 5) if first <= n * 10.0**k * of_axis <= end]
        axis.set_ticks(ticks, [f"{tick:,g}" for tick in ticks])
        axis.set_ticks([], minor=True)
    for tokens, values, style in [curve for curve in curves if len(curve[0]) > 2]:
        places = np.array([tick * tokens_per_step for tick in ticks if tick * tokens_per_step < tokens.max()])
        axes.plot(places / unit, np.interp(places, tokens, values), "o", color=style["color"], markersize=4)
        for x, y in zip(places / unit, np.interp(places, tokens, values), strict=True):
            axes.annotate(f"{y:.3g}", (x, y), (4, 4), textcoords="offset points", fontsize="small")
    seen = np.concatenate([values[tokens > 0] for tokens, values, _ in curves])
    margin = 0.06 * (seen.max() - seen.min()) or 0.1
    axes.set_ylim(seen.min() - margin, seen.max() + margin)


def draw(runs, peers, out, peers_step=524288):
    """Draw runs, of read_run, and peers, of published, into a picture. peers_step: the tokens of a step of theirs."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plotting needs matplotlib, which is not installed: pip install matplotlib") from None
    curves = [curve for i, run in enumerate(runs) for curve in curves_of_run(run, i, len(runs))]
    # to the end of the runs, or else of the published ones
    of_peers = [tokens for peer in peers for tokens, _ in peer.val if tokens]
    end = 1.03 * max([tokens.max() for _, tokens, _, _ in curves] or of_peers or [0]) or 1
    colors = [str(0.22 * (i % 4)) if runs else f"C{i % 10}" for i in range(len(peers))]
    curves += [curve for peer, color in zip(peers, colors, strict=True) for curve in curves_of_peer(peer, color, end)]
    unit = next(unit for unit in UNITS if unit <= end)
    found = {curve[0] for curve in curves}
    panels = [panel for panel in TITLES if panel in found] + sorted(found - TITLES.keys())
    steps = {run.tokens_per_step for run in runs} or {peers_step}
    rows, columns = -(-len(panels) // 2), min(2, len(panels))
    heights = [5.5, *[3.5] * (rows - 1)]
    figure = Figure(figsize=(6.5 * columns, sum(heights)), dpi=100, layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flatten()
    for axes, panel in zip(places, panels, strict=False):
        of_panel = [curve[1:] for curve in curves if curve[0] == panel]
        draw_panel(axes, panel, of_panel, end, unit)
        if not runs and of_peers:
            show_beginning(axes, of_panel, min(of_peers), end, unit, *steps)
        elif len(steps) == 1:
            add_steps(axes, unit, *steps)
    for axes in places[len(panels) :]:
        axes.remove()
    try:
        with atomic_write(out) as file:
            figure.savefig(file, format=Path(out).suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out}: {error}") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw the curves of runs", allow_abbrev=False)
    parser.add_argument("logs", nargs="*", metavar="LOG", help="a log.txt, or the log_dir that holds one")
    parser.add_argument("--out", default="curve.png", help="a .png, .pdf or .svg file (default: %(default)s)")
    parser.add_argument("--tokens_per_step", type=int, help="of every LOG (default: from a checkpoint beside it)")
    parser.add_argument("--size", choices=[*SIZES.values(), OTHER], help="of every LOG's model; likewise")
    parser.add_argument("--dataset", choices=[*DATASETS, OTHER], help="of every LOG; likewise")
    args = parser.parse_args(argv)
    if not args.logs and args.size in (None, OTHER):
        raise UserError("nothing to draw: give the log_dir of a run, or --size 124M --dataset fineweb-edu")
    runs = [read_run(log, args.tokens_per_step, args.size, args.dataset) for log in args.logs]
    for run in [run for run in runs if [other.name for other in runs].count(run.name) > 1]:
        run.name = str(run.path)
    kinds = {(run.size, run.dataset) for run in runs} or {(args.size, args.dataset)}
    peers = [
        peer if peer.dataset in (dataset, "") else peer._replace(val=[])  # HellaSwag is the same whatever the data
        for size, dataset in sorted(kinds)
        for peer in published(size)
    ]
    draw(runs, peers, expand(args.out))
    say(f"drawn: {args.out}")


if __name__ == "__main__":
    run_as_command(main)
