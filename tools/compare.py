"""
Is a change better, or was the seed lucky? Train with and without it, seed by seed, and judge the differences.

    python -m tools.compare -- --max_lr 1e-2                    # a setting, against the preset as it is
    python -m tools.compare --code ../my_copy                   # an edited copy of the scripts, against this one
    python -m tools.compare --diff my.diff --seeds 8            # a diff: by git diff, or as in docs/hacking.md

The two runs of a seed begin with the same weights and see the same data in the same order, so what a seed adds to the
loss cancels, as far as the change leaves training on its course. The verdict is on the loss on the whole validation
split after the last step; the 95% interval of the mean difference is Student's t over the pairs. The code is copied
first, so you can keep editing. Finished runs are kept in --folder and used again, an interrupted one is resumed.
"""

import argparse
import hashlib
import json
import math
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parent.parent))  # python tools/compare.py works, too
from lib.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint
from lib.console import UserError, run_as_command, say
from lib.data.folder import ShardFolder
from lib.device import default_device, name_of
from lib.files import ROOT, atomic_write, expand, hash_file, list_folder
from tools.plot import UNITS, enlarge_the_end, plot_curves, read_run, save, smooth, tokens_at
from train_gpt2 import PRESETS

QUIET = [f"--{what}_every=0" for what in ("hellaswag", "sample", "plot")]
MEASURE = [f"--val_every={2**40}", f"--val_tokens={2**40}"]  # at the beginning and the end, on the whole split
STOPPED = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGKILL)  # exit codes of a run that others ended
# the 97.5% quantile of Student's t with 1, 2, ... degrees of freedom
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class DoesNotTrain(Exception):
    """A run crashed or diverged, which is also a result."""


# -----------------------------------------------------------------------------
# Code


def apply_diff(text, folder):
    """Apply a diff to the files in a folder: by git, or the fenced parts of a Markdown page, each after the name of its
    file in backquotes. Line numbers are ignored: the old lines of each part must be in one place only."""
    path, applied = None, False
    for part in re.split(r"^(?=\+\+\+ |`[^`\s]+`$|@@|```)", text, flags=re.M):
        first, *lines = part.splitlines() or [""]
        if name := re.fullmatch(r"\+\+\+ (?:b/)?(\S+).*|`([^`]+)`", first):
            path = folder / (name[1] or name[2])
        lines = [line or " " for line in lines if line[:1] in ("", *" -+") and not line.startswith("--- ")]
        if not (path and lines and first.startswith(("@@", "```diff"))):
            continue
        old, new = ("".join(line[1:] + "\n" for line in lines if line[0] in kinds) for kinds in (" -", " +"))
        content = path.read_text(encoding="utf-8") if path.exists() else ""
        if content.count(old) != 1:  # a new file is empty, and so is what it replaces
            found = f"found {content.count(old)} times in {path.name}, must be once (is the diff applied already?)"
            raise UserError(f"the diff does not fit; {found}:\n{old}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.replace(old, new), encoding="utf-8")
        applied = True
    if not applied:
        raise UserError("not a diff: expected what git diff prints, or parts as in docs/hacking.md")


def copy_code(source, folder, diff=None):
    """Copy the scripts in `source` to folder/code_HASH, with a diff (the path of its file) applied, and return that."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            copy = Path(temporary) / "code"
            for name in ("lib", "assets"):
                shutil.copytree(source / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            for path in source.glob("*.py"):
                shutil.copy(path, copy)
            if diff:
                apply_diff(Path(expand(diff)).read_text(encoding="utf-8"), copy)
            files = sorted(path for path in copy.rglob("*") if path.is_file())
            place = folder / f"code_{hash_of([(str(path.relative_to(copy)), hash_file(path)) for path in files])}"
            if not place.exists():
                copy.rename(place)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot copy the code to compare into {folder}/: {error}") from None
    return place


def hash_of(facts):
    """A short name of plain data, the same for the same data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]


# -----------------------------------------------------------------------------
# Runs


def data_of(run):
    """Identifies the data of a run, by its settings; None if it is gone."""
    data_dir = json.loads((run / "config.json").read_bytes())["data_dir"]
    return hash_of(ShardFolder(data_dir).facts) if list_folder(data_dir) else None


def launch(command, console):
    """Run a program to its end, its output in the file `console`; return its exit code. Ctrl-C stops it, too."""
    process = subprocess.Popen(command, stdout=console, stderr=console, stdin=subprocess.DEVNULL)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()  # a terminal has sent it a signal already: the two count as one
        process.wait()
        raise


def start(code, flags, run):
    """Train in the folder of a run. Raises DoesNotTrain if it crashes or diverges, UserError if it ends otherwise."""
    with open(run / "console.txt", "ab") as console:
        ended = launch([sys.executable, str(code / "train_gpt2.py"), *flags, "--log_dir", str(run)], console)
    printed = (run / "console.txt").read_text(encoding="utf-8", errors="replace")
    failure = f"{printed.rstrip().rpartition(chr(10))[2].removeprefix('error: ')} (see {run}/console.txt)"
    if ended in STOPPED:
        raise UserError(f"the run was stopped by signal {-ended}: the same command continues")
    if ended == 2 and "NaN or infinite in steps" not in failure:
        raise UserError(failure)
    if ended:
        raise DoesNotTrain(failure if ended > 0 else f"killed by signal {-ended} (see {run}/console.txt)")


def train(folder, code, flags, seed):
    """What a run gave: its folder, val_loss in nats per token, seconds of training, tokens, parameters. Trains if there
    is no result for this code, these flags and what decides the rounding, or if the data has changed since."""
    rounding = torch.__version__, torch.get_num_threads(), name_of(torch.device(default_device()))
    run = folder / hash_of([code.name, flags, *rounding]) / f"seed_{seed}"
    path = run / "result.json"
    if path.exists():
        result = json.loads(path.read_bytes())
        if result["data"] == data_of(run):
            return {"run": run, **result}
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    resume = ["--init_from", "resume"] * (run / "config.json").exists()
    start(code, [*flags, *MEASURE, *resume, "--seed", str(seed)], run)
    if not list_checkpoints(run):
        raise UserError(f"{run}/ has no checkpoint: leave out --checkpoint_every 0")
    end = load_checkpoint(newest_checkpoint(run))
    if not math.isfinite(end["val_loss"]):
        raise DoesNotTrain(f"the validation loss is {end['val_loss']}")
    weights = {w.data_ptr(): w.numel() for w in end["model"].values() if torch.is_tensor(w)}  # tied ones once
    result = {"val_loss": end["val_loss"], "seconds": end["seconds"]["training"], "tokens": end["tokens"]}
    result |= {"parameters": sum(weights.values()), "data": data_of(run)}
    with atomic_write(path) as file:
        file.write(json.dumps(result).encode())
    for checkpoint in list_checkpoints(run):
        checkpoint.unlink()
    return {"run": run, **result}


# -----------------------------------------------------------------------------
# The verdict


def half_width(deviation, n, freedom):
    """Half of a 95% interval of a mean of n. Beyond the end of T, its last value: at most 4% too wide."""
    return T[min(freedom, len(T)) - 1] * deviation / n**0.5


def judge(changed, unchanged):
    """The verdict on two lists of losses, a pair for each seed, as a dict: the mean difference, changed - unchanged,
    and its 95% interval; the same as if the runs were no pairs; pairs that would show half the difference."""
    n = len(changed)
    differences = [a - b for a, b in zip(changed, unchanged, strict=True)]
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    half = half_width(deviation, n, n - 1)
    loose = half_width((statistics.variance(unchanged) + statistics.variance(changed)) ** 0.5, n, 2 * n - 2)
    verdict = "worse" if mean - half > 0 else "better" if mean + half < 0 else "no difference shown"
    enough = (m for m in range(2, 10_000) if half_width(deviation, m, m - 1) < abs(mean) / 2)
    return {
        "verdict": verdict, "difference": mean, "low": mean - half, "high": mean + half, "pairs": n,
        "unpaired_low": mean - loose, "unpaired_high": mean + loose, "pairs_for_half": next(enough, None),
        "differences": differences, "unchanged": unchanged, "changed": changed,
    }  # fmt: skip


def describe(v):
    """A verdict of judge() in a line."""
    interval = f"95% from {v['low']:+.4f} to {v['high']:+.4f}, {v['pairs']} pairs"
    return f"{v['verdict']} | val loss {v['difference']:+.4f} nats, {interval}"


def draw(v, sides, out):
    """The curves of both sides and the differences by seed, as a picture. sides: the results of each, by seed."""
    curves = []
    for results, name, color in zip(sides, ("changed", "unchanged"), ("C1", "C0"), strict=True):
        runs = [read_run(result["run"], None) for result in results]
        losses = [smooth(np.array([*run.records["train"].values()])) for run in runs]
        tokens = tokens_at(runs[0], np.array([*runs[0].records["train"]]))
        curves += [(tokens, line, {"color": color, "linewidth": 0.5, "alpha": 0.5}) for line in losses]
        curves.append((tokens, np.mean(losses, axis=0), {"color": color, "linewidth": 1.8, "label": name}))
    end = max(tokens[-1] for tokens, _, _ in curves)
    unit = next(unit for unit in UNITS if unit <= end)
    figure = Figure((12, 5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    seen = plot_curves(left, curves, end, unit)
    enlarge_the_end(left, curves, seen, end, unit)
    left.set(title="training loss, nats per token", xlabel=UNITS[unit])
    left.legend(loc="lower left", fontsize="small")
    seeds = np.arange(1, v["pairs"] + 1)
    right.axhline(0, color="0.4", linewidth=1)
    right.axhspan(v["low"], v["high"], color="C1", alpha=0.15, label="95% interval of the mean")
    right.axhline(v["difference"], color="C1", label=f"mean {v['difference']:+.4f}")
    right.plot(seeds, v["differences"], "o", color="C1", label="changed - unchanged")
    right.set(title="difference in validation loss, by seed", xlabel="seed", xticks=seeds)
    right.legend(fontsize="small")
    right.grid(alpha=0.3)
    figure.suptitle(describe(v))
    save(figure, out)


# -----------------------------------------------------------------------------
# The comparison


def train_pair(sides, seed, folder):
    """The results of both sides with a seed. sides: (name, code, flags) of each."""
    pair, failed = [], []
    for name, code, flags in sides:
        try:
            result = train(folder, code, flags, seed)
        except DoesNotTrain as error:
            failed.append(f"{name}, seed {seed}: {error}")
            continue  # whether the other side fails, too
        except UserError as error:
            raise UserError(f"{name}, seed {seed}: {error}") from None
        took = f"{result['seconds']:.0f} s of training"
        say(f"seed {seed}, {name:9} | val loss {result['val_loss']:.4f} | {took} | {result['run']}")
        pair.append(result)
    if failed:
        raise DoesNotTrain("; ".join(failed))
    return pair


def report(v, sides):
    """Print what stands beside the verdict: the value of the pairs, and what the change costs. sides: results."""
    say(f"without pairing: 95% from {v['unpaired_low']:+.4f} to {v['unpaired_high']:+.4f}")
    if v["verdict"] in ("better", "worse"):
        say(f"about {v['pairs_for_half']} pairs would show half the difference")
    for name, results in zip(("changed", "unchanged"), sides, strict=True):
        cost = {"seconds": statistics.median(result["seconds"] for result in results)}
        cost["tokens_per_second"] = statistics.median(result["tokens"] / result["seconds"] for result in results)
        v[f"cost_of_{name}"] = cost | {"parameters": results[0]["parameters"]}
    a, b = v["cost_of_changed"], v["cost_of_unchanged"]
    ratio = a["tokens_per_second"] / b["tokens_per_second"]
    say(
        f"changed and unchanged: {a['seconds']:.0f} and {b['seconds']:.0f} s of training, x {ratio:.2f} the speed, "
        f"{a['parameters']:,} and {b['parameters']:,} parameters"
    )


def compare(args):
    """Train in pairs and print the verdict."""
    for flag in args.both + args.only:
        if re.match(r"--(preset|seed|log[-_]dir|val[-_]every|val[-_]tokens)\b", flag):
            raise UserError(f"{flag} is set by the comparison itself: see python -m tools.compare --help")
    for path in filter(None, (args.out, args.json)):
        if not Path(expand(path)).absolute().parent.is_dir():
            raise UserError(f"{path}: there is no such folder")
    folder = Path(expand(args.folder))
    flags = ["--preset", args.preset, *QUIET, *args.both]
    changed = copy_code(Path(expand(args.code or ROOT)), folder, args.diff)
    unchanged = copy_code(ROOT, folder)
    sides = [("changed", changed, flags + args.only), ("unchanged", unchanged, flags)]  # a wrong flag shows at once
    pairs = []
    try:
        for seed in range(1, args.seeds + 1):
            pairs.append(train_pair(sides, seed, folder))
            if len(pairs) > 1:
                results = list(zip(*pairs, strict=True))
                verdict = judge(*[[result["val_loss"] for result in side] for side in results])
                say(f"so far: {describe(verdict)}")
        report(verdict, results)
        draw(verdict, results, expand(args.out))
        text = describe(verdict)
    except DoesNotTrain as error:
        verdict = {"verdict": "does not train", "reason": str(error)}
        text = f"does not train: {error}"
    if args.json:
        Path(expand(args.json)).write_text(json.dumps(verdict, indent=1) + "\n")
    say(f"verdict: {text}")
    return verdict


def main(argv=None):
    parser = argparse.ArgumentParser(description="Judge a change by pairs of runs with equal seeds", allow_abbrev=False)
    default = " (default: %(default)s)"
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--code", help="a folder with an edited copy of the scripts, for the changed side")
    change.add_argument("--diff", help="a file with a diff, which is applied to a copy of these scripts")
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="of both sides" + default)
    parser.add_argument("--seeds", type=int, default=5, help="pairs of runs, 2 or more" + default)
    both = 'flags of train_gpt2.py for both sides, as --both="--n_layer 2"'
    parser.add_argument("--both", type=shlex.split, default="", help=both)
    parser.add_argument("--out", default="compare.png", help="the picture, a .png, .pdf or .svg" + default)
    parser.add_argument("--json", help="write the verdict and its numbers to this file")
    parser.add_argument("--folder", default="compare", help="of the runs and the copied code" + default)
    parser.add_argument("only", nargs="*", metavar="-- FLAG", help="flags of train_gpt2.py for the changed side")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error("--seeds must be 2 or more: a single pair has no interval")
    return run_as_command(compare, args, interrupted="interrupted: the same command continues")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: stops the run in progress, too
    main()
