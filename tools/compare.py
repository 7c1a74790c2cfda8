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
import os
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
from lib.files import ROOT, atomic_write, expand, hash_file, list_folder, lock_folder
from tools.plot import UNITS, enlarge_the_end, plot_curves, read_log, read_run, save, smooth, tokens_at
from train_gpt2 import PRESETS

QUIET = [f"--{what}_every=0" for what in ("hellaswag", "sample", "plot")]
MEASURE = [f"--val_every={2**40}", f"--val_tokens={2**40}"]  # at the beginning and the end, on the whole split
WHOLE = ("lib", "assets")  # folders of which everything is copied; of others, but for NOT_COPIED, Python
NOT_COPIED = ("docs", "tests", "tools")
FENCE = r"(?im)^\s*(?:```|~~~)\s*diff"  # of a page
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


def apply_page(text, folder):
    """Apply the fenced diffs of a Markdown page, each after the name of its file in backquotes on a line of its own."""
    path, found = None, re.findall(r"^`([^`\s]+)`\s*?$|^```diff\n(.*?)^```$", text, re.M | re.S)
    if len(re.findall(FENCE, text)) != len([part for _, part in found if part]):
        raise UserError("a diff of the page does not begin with ```diff or end with ```, alone on a line")
    for name, part in found:
        path = folder / name if name else path
        if part:
            if path not in folder.rglob("*") or path.is_dir():
                raise UserError("the page does not fit: the name of a file of the code must stand before each diff")
            lines = [line or " " for line in part.splitlines()]
            old, new = ("".join(line[1:] + "\n" for line in lines if line[0] in kinds) for kinds in (" -", " +"))
            content = path.read_text(encoding="utf-8")
            if len(new) > len(old) and new in content:
                raise UserError(f"a diff of the page is applied already, in {path.name}: {new!r}")
            if content.count(old) != 1:
                raise UserError(f"a diff of the page fits {content.count(old)} places in {path.name}, not one: {old!r}")
            path.write_text(content.replace(old, new), encoding="utf-8")


def apply_diff(text, folder):
    """Apply a diff to the scripts in a folder: of git or diff -u, or those of a Markdown page such as docs/hacking.md.
    Changes of what copy_code does not copy are left out."""
    before = hash_of_folder(folder)
    if re.search(FENCE, text) and not re.search(r"(?m)^(\+\+\+|diff --git) ", text):
        apply_page(text, folder)
    else:
        names = re.findall(r"^\+\+\+ ([^\t\n]+)", text, re.M)  # b/train_gpt2.py, or without the b/
        strip = 0 if any((folder / name).parent.is_dir() for name in names if name != "/dev/null") else 1
        command = ["git", "apply", f"-p{strip}", *(f"--exclude={name}/*" for name in NOT_COPIED), "--include=*.py"]
        command += [f"--include={name}/*" for name in WHOLE]
        settings = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        settings["GIT_CEILING_DIRECTORIES"] = str(folder.resolve().parent)  # as if in no repository
        if not shutil.which("git"):
            raise UserError("--diff needs git: install it, or give an edited copy with --code")
        done = subprocess.run(command, cwd=folder, env=settings, input=text + "\n", capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"git cannot apply the diff: {' '.join(done.stderr.split())}")
    if hash_of_folder(folder) == before:
        raise UserError("the diff changes nothing of what is compared: Python files, lib/ and assets/")


def copy_code(source, folder, diff=None):
    """Copy the scripts in `source` to folder/code_HASH, with a diff (the path of its file) applied, and return that.
    Copied are Python files, and all of lib/ and assets/."""
    if missing := [name for name in ("train_gpt2.py", *WHOLE) if not (source / name).exists()]:
        raise UserError(f"{source}/ is not a copy of the scripts: it has no {missing[0]}")
    others = {folder.resolve(), *(path.parent.resolve() for path in source.glob("*/**/train_gpt2.py"))}
    others -= {source.resolve(), *source.resolve().parents}
    try:
        with lock_folder(folder, wait=True), tempfile.TemporaryDirectory(dir=folder) as temporary:
            copy = Path(temporary) / "code"
            for path in [path for top in source.iterdir() for path in (top, *top.rglob("*"))]:  # a link is followed
                parts = path.relative_to(source).parts
                hidden = any(part.startswith((".", "__pycache__", "site-packages")) for part in parts)
                if hidden or parts[0] in NOT_COPIED or others & {*path.resolve().parents}:
                    continue
                if path.is_file() and (path.suffix == ".py" or parts[0] in WHOLE):
                    (copy / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, copy / path.relative_to(source))
            if diff:
                apply_diff(diff.read_text(encoding="utf-8"), copy)
            place = folder / f"code_{hash_of_folder(copy)}"
            if not place.exists() or place.name != f"code_{hash_of_folder(place)}":  # it was edited
                shutil.rmtree(place, ignore_errors=True)
                copy.rename(place)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot copy the code to compare into {folder}/: {error}") from None
    return place


def hash_of(facts):
    """A short name of plain data, the same for the same data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]


def hash_of_folder(folder):
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    return hash_of([(str(path.relative_to(folder)), hash_file(path)) for path in paths])


# -----------------------------------------------------------------------------
# Runs


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
    resume = (run / "log" / "config.json").exists()
    command = [sys.executable, str(code / "train_gpt2.py"), *flags, *["--init_from", "resume"] * resume]
    (run / "console.txt").unlink(missing_ok=True)  # a process that was left behind may still write to the old one
    with open(run / "console.txt", "ab") as console:
        ended = launch([*command, "--log_dir", str(run / "log")], console)
    printed = (run / "console.txt").read_text(encoding="utf-8", errors="replace")
    failure = f"{printed.rstrip().rpartition(chr(10))[2].removeprefix('error: ')} (see {run}/console.txt)"
    if ended in STOPPED:
        raise UserError(f"the run was stopped by signal {-ended}: the same command continues")
    if ended == 2 and "NaN or infinite in steps" not in failure:
        again = f". To start this run anew, delete {run}/" * (resume and "is being written" not in failure)
        raise UserError(failure + again)
    if ended:
        raise DoesNotTrain(failure if ended > 0 else f"killed by signal {-ended} (see {run}/console.txt)")


def data_of(data_dir):
    """Identifies the data in a folder; None if they are gone."""
    return hash_of(ShardFolder(data_dir).facts) if list_folder(data_dir) else None


def result_of(log_dir):
    """What a run that has ended gave, from its last checkpoint and its log."""
    if not list_checkpoints(log_dir):
        raise UserError(f"{log_dir}/ has no checkpoint: the run made no step, or saved none")
    end = load_checkpoint(newest_checkpoint(log_dir))
    if max(read_log(log_dir / "log.txt").get("val", [-1])) != end["step"]:
        raise UserError(f"{log_dir}/log.txt has no validation loss of the last step, {end['step']}")
    if not math.isfinite(end["val_loss"]):
        raise DoesNotTrain(f"the validation loss is {end['val_loss']}")
    data_dir = end["train_config"]["data_dir"]
    weights = {w.data_ptr(): w.numel() for w in end["model"].values() if torch.is_tensor(w)}  # tied ones once
    result = {"val_loss": end["val_loss"], "seconds": end["seconds"]["training"], "tokens": end["tokens"]}
    return result | {"parameters": sum(weights.values()), "data_dir": data_dir, "data": data_of(data_dir)}


def train(folder, code, flags, seed):
    """What a run gave: its folder, val_loss in nats per token, seconds of training, tokens, parameters. Trains if there
    is no result for this code, these flags and what decides the rounding, or if the data has changed since."""
    rounding = torch.__version__, torch.get_num_threads(), name_of(torch.device(default_device()))
    named = [newest_checkpoint(os.path.expanduser(flag.rpartition("=")[2])) for flag in flags]  # among them init_from
    files = [(path, os.stat(path).st_size, os.stat(path).st_mtime) for path in named if os.path.isfile(path)]
    run = folder / hash_of([code.name, flags, files, *rounding]) / f"seed_{seed}"
    path = run / "result.json"
    with lock_folder(run):
        result = json.loads(path.read_bytes()) if path.exists() else None
        if result and data_of(result["data_dir"]) not in (result["data"], None):  # other data
            path.unlink()
            shutil.rmtree(run / "log")
        if not path.exists():
            start(code, [*flags, *MEASURE, "--seed", str(seed)], run)
            result = result_of(run / "log")
            with atomic_write(path) as file:
                file.write(json.dumps(result).encode())
            for checkpoint in list_checkpoints(run / "log"):
                checkpoint.unlink()
    return {"run": run / "log", **result}


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
        lines = []
        for run in [read_run(result["run"], None) for result in results]:
            steps, losses = np.array([*run.records["train"].items()]).T
            lines.append((tokens_at(run, steps), smooth(losses)))
            curves.append((*lines[-1], {"color": color, "linewidth": 0.5, "alpha": 0.5}))
        tokens = lines[0][0]
        mean = np.mean([np.interp(tokens, *line) for line in lines], axis=0)
        curves.append((tokens, mean, {"color": color, "linewidth": 1.8, "label": name}))
    end = max(tokens[-1] for tokens, _, _ in curves) or 1
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
    if pair[0]["data"] != pair[1]["data"]:
        say("warning: the sides have different data: their losses compare only if the validation shards are the same")
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
    for path in (args.code, args.diff, args.out, args.json):
        if path is not None and not (path and Path(expand(path)).absolute().parent.is_dir()):
            raise UserError(f"{path!r}: there is no such folder")
    folder = Path(expand(args.folder))
    flags = ["--preset", args.preset, *QUIET, *args.both]
    changed = copy_code(Path(expand(args.code or ROOT)), folder, args.diff and Path(expand(args.diff)))
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
        text = describe(verdict)
        try:
            draw(verdict, results, expand(args.out))
        except Exception as error:  # a verdict needs no picture, and none of the records that it shows
            say(f"warning: no picture: {error!r}")
    except DoesNotTrain as error:
        verdict = {"verdict": "does not train", "reason": str(error)}
        text = f"does not train: {error}"
    say(f"verdict: {text}")
    try:
        if args.json:
            Path(expand(args.json)).write_text(json.dumps(verdict, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {args.json}: {error}") from None
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
