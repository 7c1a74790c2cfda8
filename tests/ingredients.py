"""
What each ingredient of the recipe is worth: the demo without one of them at a time, judged as tools.compare does.

    OMP_NUM_THREADS=1 nice python tests/ingredients.py --jobs 2      # hours; continues where it stopped
    python tests/ingredients.py --write                              # the table and the picture, of what is measured

Measured runs are in compare/, which tools.compare uses as well, and in docs/bench/ingredients.json. From that come the
table of docs/ingredients.md and docs/bench/ingredients.png.
"""

import argparse
import json
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from lib.console import UserError, run_as_command, say  # noqa: E402
from tools.compare import QUIET, DoesNotTrain, copy_code, judge, train  # noqa: E402

# the flags of the changed side, or the name of a diff in docs/ingredients/, or both
ROWS = {
    "no warm-up": ["--warmup_steps=0"],
    "constant rate instead of cosine": ["--min_lr_ratio=1"],
    "no clipping": ["--grad_clip=0"],
    "no weight decay": ["--weight_decay=0"],
    "weight decay on all parameters": ["decay_on_all"],
    "betas (0.9, 0.999)": ["betas"],
    "residual projections at 0.02": ["residual_init"],
    "wpe at 0.02": ["wpe_init"],
    "untied head": ["untied_head"],  # 4.9M parameters instead of 2.5M
    "exact GELU": ["exact_gelu"],
    "squared ReLU": ["relu2"],
    "data in order": ["in_order"],
    "half the learning rate": ["--max_lr=3.5e-3"],
    "twice the learning rate": ["--max_lr=1.4e-2"],
    "layer norms after the sum": ["post_norm"],
    "no last layer norm": ["no_last_norm"],
    "bfloat16": ["--dtype=bfloat16"],
    "SGD with momentum": ["sgd", "--max_lr=0.03"],  # the best of 0.01, 0.03, 0.1, 0.3, 1 and 3 with seed 1
    "in order, wpe at 0.02, bfloat16": ["tutorial", "--dtype=bfloat16"],  # where the tutorial's script differs
}
BASE = "as it is"
RESULTS = ROOT / "docs" / "bench" / "ingredients.json"
PAGE = ROOT / "docs" / "ingredients.md"
PICTURE = "![Differences with intervals](bench/ingredients.png)"
HARDWARE = """Measured on 2 cores of a shared Intel Xeon server, one thread a run, torch 2.13.0, 2026-11-27, by
`python tests/ingredients.py`; [all numbers](bench/ingredients.json)."""


def side_of(words, folder):
    """(code, flags) of a side of the comparison."""
    diffs = [ROOT / "docs" / "ingredients" / f"{word}.diff" for word in words if not word.startswith("--")]
    flags = [word for word in words if word.startswith("--")]
    return copy_code(ROOT, folder, *diffs), ["--preset", "demo", *QUIET, *flags]


def measure(seeds, jobs, folder):
    """Train what is not known yet, seed by seed, and write RESULTS: of each row a list by seed."""
    sides = {name: side_of(words, folder) for name, words in {BASE: [], **ROWS}.items()}

    def run(job):
        seed, name = job
        code, flags = sides[name]
        try:
            return train(folder, code, flags, seed)
        except DoesNotTrain as error:
            return str(error)
        except UserError as error:  # it was stopped, or another process is at it
            say(f"{name}, seed {seed}: {error}")

    found = {name: [] for name in sides}
    work = [(seed, BASE) for seed in range(1, seeds + 1)] + [
        (seed, name) for seed in range(1, seeds + 1) for name in ROWS
    ]
    with ThreadPool(jobs) as pool:
        for (seed, name), result in zip(work, pool.imap(run, work), strict=True):
            found[name].append(result)
            say(f"seed {seed}, {name}: {result['val_loss'] if isinstance(result, dict) else result}")
            RESULTS.write_text(json.dumps(found, indent=1, default=str) + "\n")


def verdicts():
    """judge() of each row, by its name, the worst first; a row that does not train has only a reason."""
    found = json.loads(RESULTS.read_text())
    rows = {}
    for name in ROWS:
        pairs = [(a, b) for a, b in zip(found.get(name, []), found[BASE], strict=False) if a and b]
        if failed := [a for a, _ in pairs if isinstance(a, str)]:
            rows[name] = {"verdict": "does not train", "difference": float("inf"), "reason": failed[0]}
        elif len(pairs) > 1:
            rows[name] = judge(*[[result["val_loss"] for result in side] for side in zip(*pairs, strict=True)])
    return dict(sorted(rows.items(), key=lambda row: -row[1]["difference"]))


def how(words):
    """The flags of tools.compare for a row."""
    diffs = [f"`--diff docs/ingredients/{word}.diff`" for word in words if not word.startswith("--")]
    flags = [word for word in words if word.startswith("--")]
    return " ".join(diffs + [f"`-- {' '.join(flags)}`"] * bool(flags))


def write():
    """The table of PAGE, and the picture."""
    rows = verdicts()
    lines = [
        "| change | validation loss, nats | 95% interval | if unpaired | pairs | verdict | `python -m tools.compare` |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, v in rows.items():
        numbers = ["", "", "", ""]
        if "low" in v:
            numbers = [f"{v['difference']:+.3f}", f"{v['low']:+.3f} to {v['high']:+.3f}"]
            numbers += [f"{v['unpaired_low']:+.3f} to {v['unpaired_high']:+.3f}", v["pairs"]]
        verdict = v["verdict"].replace("no difference shown", "none shown at this size")
        lines.append("| " + " | ".join(map(str, [name, *numbers, verdict, how(ROWS[name])])) + " |")
    before, _, rest = PAGE.read_text().partition("<!-- measured -->")
    after = rest.partition("<!-- end -->")[2]
    table = "\n".join(lines)
    PAGE.write_text(f"{before}<!-- measured -->\n\n{PICTURE}\n\n{table}\n\n{HARDWARE}\n\n<!-- end -->{after}")

    shown = [(name, v) for name, v in rows.items() if "low" in v]
    figure = Figure((10, 1 + 0.35 * len(shown)), dpi=100, layout="constrained")
    axes = figure.subplots()
    for place, (_, v) in enumerate(shown):
        color = {"worse": "C3", "better": "C2"}.get(v["verdict"], "0.5")
        axes.plot(v["differences"], [place] * v["pairs"], ".", color=color, alpha=0.5)
        axes.errorbar(v["difference"], place, xerr=v["high"] - v["difference"], fmt="o", color=color, capsize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.invert_yaxis()
    axes.set(title="what each change does to the demo's validation loss: mean, 95% interval, each pair", xlabel="nats")
    axes.set_xscale("symlog", linthresh=0.4)
    ticks = [-0.4, -0.2, 0, 0.2, 0.4, 1, 2]
    axes.set_xticks(ticks, ticks)
    axes.grid(alpha=0.3)
    figure.savefig(RESULTS.with_suffix(".png"))
    say(f"written: {PAGE}, {RESULTS.with_suffix('.png')}")


def main():
    parser = argparse.ArgumentParser(description="What each ingredient of the recipe is worth")
    parser.add_argument("--seeds", type=int, default=5, help="pairs for each row (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default="compare", help="of the runs (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="only write the page and the picture")
    args = parser.parse_args()
    run_as_command(write if args.write else lambda: measure(args.seeds, args.jobs, args.folder))


if __name__ == "__main__":
    main()
