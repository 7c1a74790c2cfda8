"""
Do the verdicts of tools.compare tell the truth? Comparisons whose answer is known, on a model of a few seconds.

    OMP_NUM_THREADS=1 nice python tests/verdicts.py --jobs 2     # over an hour on 2 cores; continues where it stopped

Forty changes that change nothing but the rounding, or the seed of one side: at 95%, two may be called different (they
share runs, so they are not forty independent trials). Changes whose effect is known, from ten pairs of other seeds: of
ten, nine should be called right by five pairs. And what pairing gains: the spread of the differences of pairs, beside
that of runs of different seeds.
"""

import argparse
import random
import statistics
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from lib.console import run_as_command, say  # noqa: E402
from tools.compare import QUIET, copy_code, describe, judge, train  # noqa: E402

SMALL = ["n_layer=2", "n_head=2", "n_embd=32", "sequence_length=64", "total_batch_size=512"]
SMALL += ["max_steps=120", "warmup_steps=20"]
QKV, ATTENTION, MLP = (
    "self.c_attn(x).split(C, dim=2)", "x = x + self.attn(self.ln_1(x).to(x.dtype), cache, start)",
    "return x + self.mlp(self.ln_2(x).to(x.dtype))",
)  # fmt: skip
ROUNDING = {  # the same function in another order of operations
    "attention": (QKV, f"{QKV}; q, k = 3 * q, k / 3"),
    "residual": (ATTENTION, f"{ATTENTION.replace('x + self', '(3 * x + 3 * self')}) / 3"),
    "gelu": ("F.gelu(self.c_fc(x), approximate", "F.gelu(self.c_fc(x) * 3 / 3, approximate"),
    "MLP": (MLP, f"{MLP.replace('x + self', '(5 * x + 5 * self')}) / 5"),
}
EFFECTS = [
    "max_lr=0", "max_lr=7e-4", "max_lr=0.1", "max_steps=60", "max_steps=240", "total_batch_size=256",
    "total_batch_size=1024", "total_batch_size=2048", "n_embd=8", "n_embd=64", "weight_decay=100", "warmup_steps=119",
]  # fmt: skip


def main(jobs, folder):
    base = copy_code(ROOT, folder)
    sides = {"as it is": (base, [], 25), **{flag: (base, [flag], 15) for flag in EFFECTS}}
    for name, (old, new) in ROUNDING.items():
        diff = folder / f"{name}.diff"
        lines = [line for line in (ROOT / "train_gpt2.py").read_text().splitlines() if old in line]
        diff.write_text(f"`train_gpt2.py`\n\n```diff\n-{lines[0]}\n+{lines[0].replace(old, new)}\n```\n")
        sides[name] = (copy_code(ROOT, folder, diff), [], 25)

    def run(job):
        name, seed = job
        code, flags, _ = sides[name]
        flags = ["--preset", "demo", *QUIET, *(f"--{flag}" for flag in SMALL + flags)]
        return job, train(folder, code, flags, seed)["val_loss"]

    with ThreadPool(jobs) as pool:
        work = [(name, seed) for name, (_, _, seeds) in sides.items() for seed in range(1, seeds + 1)]
        loss = dict(pool.imap_unordered(run, work))

    def losses(name, seeds):
        return [loss[name, seed] for seed in seeds]

    known = right = 0
    for flag in EFFECTS:
        verdict, truth = (
            judge(losses(flag, seeds), losses("as it is", seeds)) for seeds in (range(1, 6), range(6, 16))
        )
        if truth["verdict"] != "no difference shown":
            known += 1
            right += verdict["verdict"] == truth["verdict"]
        say(f"{flag}: {describe(verdict)}; other seeds: {describe(truth)}")
    say(f"known effects called right: {right} of {known}")

    seeds = [*range(1, 26)]
    nothing = [judge(losses(name, seeds[i::5]), losses("as it is", seeds[i::5])) for name in ROUNDING for i in range(5)]
    wrong = sum(verdict["verdict"] != "no difference shown" for verdict in nothing)
    say(f"changes of the rounding called different: {wrong} of {len(nothing)}")
    draw = random.Random(0)
    for _ in range(20):
        draw.shuffle(seeds)
        nothing.append(judge(losses("as it is", seeds[:5]), losses("as it is", seeds[5:10])))
    wrong = sum(verdict["verdict"] != "no difference shown" for verdict in nothing)
    say(f"these, and other seeds on one side, called different: {wrong} of {len(nothing)}")

    spread = statistics.stdev(losses("as it is", seeds))
    say(f"standard deviations: over seeds {spread:.4f}, of the difference of two {2**0.5 * spread:.4f}, and of pairs:")
    for name in (*ROUNDING, *EFFECTS):
        seeds = range(1, sides[name][2] + 1)
        pairs = [a - b for a, b in zip(losses(name, seeds), losses("as it is", seeds), strict=True)]
        say(f"  {name}: {statistics.stdev(pairs):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Do the verdicts of tools.compare tell the truth?")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default="compare", help="of the runs (default: %(default)s)")
    args = parser.parse_args()
    run_as_command(main, args.jobs, args.folder)
