"""
Draw the curves of runs over the tokens they have seen, beside published results for models of their size.

    python -m tools.plot log                                        # writes curve.png
    python -m tools.plot log other_log/log.txt --out both.png
    python -m tools.plot --size 124M --dataset fineweb-edu          # the published runs alone

log.txt counts steps. The tokens of a step, the size of the model and its data come from config.json beside it. The loss
has a wide panel with its last part enlarged, HellaSwag a second one; each other kind of record has a small one below. A
run that started from other weights is not compared with the published ones.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))  # python tools/plot.py works, too
from lib.console import UserError, run_as_command, say
from lib.files import atomic_write, expand
from lib.run.log import read_log
from tools.reference_runs import DATASETS, OTHER, SHAPES, dataset_of, published

TITLES = {  # of the first panels, by kind of record; the panel of any other kind has the kind as its title
    "val": "loss, nats per token", "hella": "HellaSwag, acc_norm", "lr": "learning rate",
    "norm": "gradient norm",
}  # fmt: skip
WIDE = ("val", "hella")
FEW = 20  # up to this many records of a kind are marked with points, since the line between them was not measured
UNITS = {1e9: "billions of tokens", 1e6: "millions of tokens", 1e3: "thousands of tokens", 1: "tokens"}


def settings_beside(log):
    """(tokens per step, size, dataset) of a run, from the config.json beside its log.txt; None, other if unknown."""
    try:
        config = json.loads(log.with_name("config.json").read_bytes())
        data_dir = Path(config["data_dir"])
        shards = [path.name for path in data_dir.glob("*_[tv]*") if path.suffix in (".npy", ".bin")]
        size = SHAPES.get((config["n_layer"], config["n_embd"]), OTHER) if config["init_from"] == "scratch" else OTHER
        return config["total_batch_size"], size, dataset_of(shards or [data_dir.name])
    except (OSError, ValueError, KeyError, TypeError):  # none, or another program's
        return None, OTHER, OTHER


def read_run(name, tokens_per_step):
    """The run of a log.txt or log_dir. tokens_per_step: None for what its config.json says."""
    path = Path(expand(name))
    path = path / "log.txt" if os.path.isdir(path) else path
    run = SimpleNamespace(records=read_log(path), path=Path(os.path.realpath(path)))
    name = run.path.parent.name if path.name == "log.txt" else path.name
    run.name = " " * name.startswith("_") + name.replace("$", r"\$")  # matplotlib gives _ and $ a meaning
    found, run.size, run.dataset = settings_beside(run.path)
    run.tokens_per_step = found if tokens_per_step is None else tokens_per_step
    if not isinstance(run.tokens_per_step, int) or run.tokens_per_step < 1:
        raise UserError(
            f"{path} has no config.json of train_gpt2.py beside it that says how many tokens a step has: give "
            "--tokens_per_step, the total_batch_size of the run (524288 by default), 1 or more"
        )
    return run


def smooth(values):
    """The mean of the finite values around each one: up to a fiftieth of the curve to either side, less at its start,
    where it falls."""
    places, finite = np.arange(len(values)), np.isfinite(values)
    half = np.minimum(places, len(values) // 50)
    total, count = (np.cumsum([0, *v]) for v in (np.where(finite, values, 0), finite))
    first, end = places - half, np.minimum(places + half + 1, len(values))
    total, count = total[end] - total[first], count[end] - count[first]
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def curves_of_run(run, color):
    """Yield the curves of a run: (panel, tokens, values, style) each."""
    for kind, records in run.records.items():
        tokens, values = np.array(sorted(records.items()), dtype=float).reshape(-1, 2).T
        tokens *= run.tokens_per_step
        panel = "val" if kind == "train" else kind
        label = run.name + {"train": ", training", "val": ", validation"}.get(kind, "")
        line = {"color": color, "label": label, "linewidth": 1.6, "zorder": 3}
        if kind in ("train", "norm"):  # noisy: the smoothed curve over the records
            yield panel, tokens, values, {"color": color, "linewidth": 0.5, "alpha": 0.3}
            values = smooth(values)
            line |= {"linewidth": 0.8, "zorder": 2}
        yield panel, tokens, values, line


def curves_of_peer(peer, color, end):
    """The same of a published run or model; a model whose training is not published is a line up to `end`."""
    for kind in WIDE:
        points = getattr(peer, kind)
        if points and points[0][0] is None:
            points = [(tokens, points[0][1]) for tokens in (0, end)]
        if points:
            style = ":" if points[0][1] == points[-1][1] else "-"
            yield kind, *np.array(points).T, {"color": color, "linestyle": style, "linewidth": 1.2, "label": peer.name}


def plot_curves(axes, curves, end, unit):
    """Plot curves up to `end` tokens. Returns what is seen of them, (tokens, values) without gaps."""
    seen = []
    for tokens, values, style in curves:
        inside = np.isfinite(values) & (tokens <= end)
        marker = "." if inside.sum() <= FEW and style.get("linestyle") != ":" else None
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


def list_beside(axes, curves, end):
    """A legend at the right of the axes, in the order of the last values, which it shows."""
    named = []
    for (tokens, values, style), line in zip(curves, axes.lines, strict=True):
        last = values[np.isfinite(values) & (tokens <= end)][-1:]
        if "label" in style and len(last):
            named.append((last[0], f"{last[0]:.4f}  {style['label']}", line))
    named.sort(key=lambda item: -item[0])
    _, texts, lines = zip(*named, strict=True) if named else ((), (), ())
    axes.legend(lines, texts, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


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


def draw(runs, peers, out):
    """Draw runs, of read_run, and peers, of published, into a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plotting needs matplotlib, which is not installed: pip install matplotlib") from None
    curves = [curve for i, run in enumerate(runs) for curve in curves_of_run(run, f"C{i % 10}")]
    # to the end of the runs, or else of the published ones
    of_peers = [tokens for peer in peers for tokens, _ in peer.val if tokens]
    steps = {run.tokens_per_step for run in runs} or {524288}  # the published runs'
    end = max([tokens.max() for _, tokens, _, _ in curves] or of_peers or [0]) or max(steps)
    for i, peer in enumerate(peers):
        curves += curves_of_peer(peer, f"{0.3 + 0.2 * (i % 3):.1f}" if runs else f"C{i % 10}", end)
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
            list_beside(axes, of_panel, end)
        if panel == "val":
            enlarge_the_end(axes, of_panel, seen, end, unit)
    for axes in places[len(wide) - 1 :]:
        axes.set_xlabel(UNITS[unit])
    if len(steps) == 1:
        tokens_per_step = max(steps)
        functions = (lambda x: x * unit / tokens_per_step, lambda x: x * tokens_per_step / unit)
        places[0].secondary_xaxis("top", functions=functions).set_xlabel(f"steps of {tokens_per_step:,} tokens")
    try:
        with atomic_write(out) as file:
            figure.savefig(file, format=Path(out).suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out}: {error}") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw the curves of runs", allow_abbrev=False)
    parser.add_argument("logs", nargs="*", metavar="LOG", help="a log.txt, or the log_dir that holds one")
    parser.add_argument("--out", default="curve.png", help="a .png, .pdf or .svg file (default: %(default)s)")
    parser.add_argument("--tokens_per_step", type=int, help="of every LOG (default: from config.json beside it)")
    parser.add_argument("--size", choices=SHAPES.values(), help="without LOG: draw the published runs of this size")
    parser.add_argument("--dataset", choices=[*DATASETS, OTHER], default=OTHER, help="of the published runs' losses")
    args = parser.parse_args(argv)
    if not args.logs and not args.size:
        raise UserError("nothing to draw: give the log_dir of a run, or --size 124M --dataset fineweb-edu")
    runs = [read_run(log, args.tokens_per_step) for log in args.logs]
    for run in [run for run in runs if [other.name for other in runs].count(run.name) > 1]:
        run.name = str(run.path)
    kinds = {(run.size, run.dataset) for run in runs} or {(args.size, args.dataset)}
    peers = {}  # each one once, with its losses if one of the runs has its data
    for peer in [peer for kind in sorted(kinds) for peer in published(*kind)]:
        peers[peer.name] = peer if peer.val else peers.get(peer.name, peer)
    draw(runs, [*peers.values()], expand(args.out))
    say(f"drawn: {args.out}")


if __name__ == "__main__":
    run_as_command(main)
