"""
The curves of one or several runs over the tokens they have seen, beside what is published for models of their size.

    python -m tools.plot log                                        # writes curve.png
    python -m tools.plot log other_log/log.txt --out both.png
    python -m tools.plot --size 124M --dataset fineweb-edu          # the published runs alone

log.txt counts steps. The tokens of a step, the size of the model and its data come from a checkpoint beside it, or from
the flags.
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

UNITS = {1e9: "billions of tokens", 1e6: "millions of tokens", 1e3: "thousands of tokens", 1: "tokens"}


def read_checkpoint(log_dir):
    """Tokens of a step, size and dataset of the run whose checkpoints are in log_dir; None where none can be read."""
    import torch  # here, since it takes seconds and the trainer gives the flags

    from lib.run.checkpoints import list_checkpoints

    for path in list_checkpoints(log_dir)[::-1]:
        try:  # with mmap the weights stay on the disk
            contents = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            size = size_of(SimpleNamespace(**contents["config"]))
            return contents["train_config"]["total_batch_size"], size, dataset_of(contents.get("data"))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, AttributeError):
            continue  # damaged, or another program's
    return None


def read_run(name, tokens_per_step, size, dataset):
    """The run of a log.txt or log_dir; what is None of it comes from a checkpoint."""
    path = Path(expand(name))
    path = path / "log.txt" if os.path.isdir(path) else path
    run = SimpleNamespace(records=read_log(path), path=Path(os.path.realpath(path)))
    name = run.path.parent.name if path.name == "log.txt" else path.name
    run.name = " " * name.startswith("_") + name.replace("$", r"\$")  # which matplotlib would take for its own
    given = tokens_per_step, size, dataset
    found = (read_checkpoint(path.parent) if None in given else None) or (None, OTHER, OTHER)
    run.tokens_per_step, run.size, run.dataset = (f if g is None else g for g, f in zip(given, found, strict=True))
    if run.tokens_per_step is None:
        raise UserError(
            f"{path} has no checkpoint of train_gpt2.py beside it that says how many tokens a step has: give "
            "--tokens_per_step, the total_batch_size of the run (524288 by default)"
        )
    return run


def smooth(values):
    """The mean of the finite values around each one, a fiftieth of the curve to either side."""
    window, finite = np.ones(2 * (len(values) // 50) + 1), np.isfinite(values)
    total, count = (np.convolve(v, window, "same") for v in (np.where(finite, values, 0), finite))
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def curves_of_run(run, color):
    """What is drawn of a run: (panel, tokens, values, style) of each curve."""
    for kind, records in run.records.items():
        tokens, values = np.array(sorted(records.items()), dtype=float).reshape(-1, 2).T
        tokens *= run.tokens_per_step
        if kind == "train":
            yield "val", tokens, values, {"color": color, "linewidth": 0.5, "alpha": 0.25}
            label = f"{run.name}, training"
            yield "val", tokens, smooth(values), {"color": color, "linewidth": 1, "alpha": 0.6, "label": label}
        else:
            label = f"{run.name}, validation" if kind == "val" else run.name
            yield kind, tokens, values, {"color": color, "marker": "o", "markersize": 3.5, "label": label}


def curves_of_peer(peer, gray, end):
    """The same of a published run or model; a model whose training is not published is a line up to `end`."""
    for kind in ("val", "hella"):
        points = getattr(peer, kind)
        if points and points[0][0] is None:
            points = [(tokens, points[0][1]) for tokens in (0, end)]
        if points:
            style = ":" if points[0][1] == points[-1][1] else "--"
            yield kind, *np.array(points).T, {"color": gray, "linestyle": style, "label": peer.name}


def draw(runs, peers, out):
    """Draw runs, of read_run, and peers, of published, into a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the picture takes matplotlib, which is not installed: pip install matplotlib") from None
    curves = [curve for i, run in enumerate(runs) for curve in curves_of_run(run, f"C{i % 10}")]
    # as far as the runs have come; without one, to the end of the published ones
    of_peers = [tokens for peer in peers for tokens, _ in peer.val if tokens]
    end = 1.03 * max([tokens.max() for _, tokens, _, _ in curves] or of_peers or [0]) or 1
    curves += [curve for i, peer in enumerate(peers) for curve in curves_of_peer(peer, str(0.22 * (i % 4)), end)]
    unit = next(unit for unit in UNITS if unit <= end)
    titles = {"val": "loss, nats per token", "hella": "HellaSwag, acc_norm"}
    panels = [panel for panel in titles if any(curve[0] == panel for curve in curves)]
    figure = Figure(figsize=(6.5 * len(panels), 5.5), dpi=120, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        # the loss of the first twentieth falls so deep that nothing could be told apart after it
        start, early, inside = end / 20 if panel == "val" else 0, [], []
        for tokens, values, style in [curve[1:] for curve in curves if curve[0] == panel]:
            axes.plot(tokens / unit, values, **style)
            seen = np.isfinite(values) & (tokens <= end)
            early.extend(values[seen & (tokens < start)])
            inside.extend(values[seen & (tokens >= start)])
        low, high = (limit(inside or early or [0]) for limit in (min, max))
        margin = 0.04 * (high - low) or 0.1
        axes.set(ylim=(low - margin, high + margin), xlim=(0, end / unit), xlabel=UNITS[unit], title=titles[panel])
        axes.legend(loc="upper right" if panel == "val" else "best", fontsize="small")
        axes.grid(alpha=0.3)
    try:
        with atomic_write(out) as file:
            figure.savefig(file, format=Path(out).suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out}: {error}") from None


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw the curves of runs", allow_abbrev=False)
    parser.add_argument("logs", nargs="*", metavar="LOG", help="a log.txt, or the log_dir that holds one")
    parser.add_argument("--out", default="curve.png", help="a .png, .pdf or .svg file (default: %(default)s)")
    parser.add_argument("--tokens_per_step", type=int, help="of every LOG (default: as a checkpoint beside it says)")
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
