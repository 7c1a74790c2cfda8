"""
What only a GPU can show, in one command: is this code right, fast and sparing on this GPU?

    python tests/on_gpu.py                            # 8 minutes at most, one GPU; --quick: 3
    python tests/on_gpu.py --peer ../build-nanogpt    # the tutorial's code as well, from a clone, on the same tokens
    python tests/on_gpu.py --tiny                     # a small model on any machine: shows that the program works

It writes on_gpu/on_gpu.md, to paste into an issue, on_gpu.json, and what each part printed. A part that fails is
reported, and the others run. The tests need requirements-dev.txt.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.console import run_as_command, say  # noqa: E402
from lib.device import attention_kernel, name_of, peak_tflops  # noqa: E402

TINY = ["--preset=demo", "--max_steps=60", "--warmup_steps=4", "--log_every=1"]
PEER = (  # settings of the tutorial's script that this measurement changes: steps, compile, no downloads
    ("max_steps = 19073", "max_steps = 30"), ("use_compile = False", "use_compile = True"),
    ('enc = tiktoken.get_encoding("gpt2")', "enc = None"), ("from hellaswag import", "# from hellaswag import"),
)  # fmt: skip
PEER_TINY = (
    ("total_batch_size = 524288", "total_batch_size = 1024"), ("B = 64", "B = 8"), ("T = 1024", "T = 128"),
    ("GPTConfig(vocab_size=50304)", "GPTConfig(vocab_size=50304, n_layer=4, n_head=4, n_embd=48)"),
)  # fmt: skip


class Failed(Exception):
    pass


class Lab:
    """Runs programs and keeps what they print. flags: of train_gpt2.py in every part."""

    def __init__(self, folder, minutes, tiny):
        self.folder, self.tiny = folder, tiny
        self.end = time.monotonic() + 60 * minutes
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        peak = peak_tflops(name_of(self.device)) or 0
        tokens = 2**19 if peak >= 300 else 2**16  # a step of a second or two
        self.flags = TINY if tiny else f"--total_batch_size {tokens} --max_steps 60 --warmup_steps 20".split()

    def run(self, name, *command, limit, folder=ROOT, **env):
        """Run a Python program, at most `limit` seconds and the time that is left. Returns what it printed."""
        limit = min(limit, self.end - time.monotonic())
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        if limit < 10:
            raise Failed("skipped: no time was left")
        with open(self.folder / f"{name}.txt", "w+") as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                cwd=folder, env={**os.environ, "PYTHONPATH": path, **env}, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise Failed(f"not finished after {limit:.0f} s") from None
                raise
            output.seek(0)
            text = output.read()
        if code:
            raise Failed(f"exit code {code}, {text.strip().rpartition(chr(10))[2]}")
        return text

    def train(self, name, *flags, limit, log="log", **env):
        """A run of train_gpt2.py on the demo's text, which says at its end what memory it took."""
        where = ["--data_dir", self.folder / "data", "--data_source", "demo", "--log_dir", self.folder / log]
        others = ["--plot_every", "0", "--checkpoint_every", "0", "--hellaswag_every", "0", "--sample_every", "0"]
        program = ROOT / "tests" / "probes" / "memory_of_training.py"
        return self.run(name, program, *self.flags, *others, "--val_every", "0", *where, *flags, limit=limit, **env)


def speed_of(printed):
    """The median tokens/s and MFU of the last steps of a run, in words."""
    speeds = [int(s.replace(",", "")) for s in re.findall(r"([\d,]+) tok/s", printed)][-15:]
    mfu = [float(s) for s in re.findall(r"MFU ([\d.]+)%", printed)][-15:]
    return f"{statistics.median(speeds):,.0f} tokens/s" + (f", MFU {statistics.median(mfu):.1f}%" if mfu else "")


def found(pattern, text):
    match = re.search(pattern, text)
    return match[1] if match else "not printed"


# -----------------------------------------------------------------------------
# The parts: each yields rows of (what, result)


def machine(lab):
    yield "torch", f"{torch.__version__}, Python {sys.version.split()[0]}"
    if not lab.cuda:
        return
    ask = ["nvidia-smi", "--query-gpu=driver_version,memory.total,power.limit", "--format=csv,noheader"]
    try:
        driver = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    yield "driver, memory, power limit", driver
    yield "CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    yield "kernel of attention", attention_kernel(12, 1024, 64, dtype, lab.device)
    yield "peak by datasheet", f"{peak_tflops(name_of(lab.device))} TFLOP/s"


def training(lab):
    every = ["--val_every=30", "--val_tokens=655360", "--sample_every=30", "--hellaswag_every=60"]
    every[1] = "--val_tokens=8192" if lab.tiny else every[1]
    printed = lab.train("training", *every, "--checkpoint_every=60", limit=240, TORCH_LOGS="recompiles,graph_breaks")
    before, after = re.split(r"step +0/\d+ ", printed, maxsplit=1)
    yield "60 steps with all evaluations", speed_of(printed)
    yield "run", found(r"(GPT-2, .*)", before) + "; " + found(r"steps of .*: (.*)", before)
    yield "recompilations after step 0, broken graphs", f"{after.count('Recompiling')}, {printed.count('Graph break')}"
    yield "memory", found(r"memory \| (.*)", printed)
    losses = re.findall(r"step +(\d+) \| val loss ([\d.]+)", printed)
    yield "validation loss, by step", ", ".join(f"{step}: {loss}" for step, loss in losses)
    if "without HellaSwag" not in printed:
        yield "HellaSwag, at the last step", found(r"step +60 \| HellaSwag ([\d.]+)", printed)


def resume(lab):
    printed = lab.train("resume", "--max_steps=66", "--init_from=resume", limit=90)
    step, loss = found(r"(resuming at step \d+)", printed), found(r"step +60/66 \| loss ([\d.]+)", printed)
    yield "resume", f"{step}, loss {loss}"


def tests(lab):
    quick = ["-k", "resumed"] if lab.tiny else []
    printed = lab.run("tests", "-m", "pytest", "-q", "-o", "addopts=", "-m", "gpu", "tests", *quick, limit=180)
    yield "tests marked gpu", printed.strip().splitlines()[-1].strip("= ")


def ladder(lab):
    printed = lab.run("ladder", "-m", "tools.bench", *["--batch=2"] * lab.tiny, limit=150)
    rows = re.findall(r"^(\S.*?)  +([\d.]+ ms) +([\d,]+ tokens/s) +x ([\d.]+)", printed, re.M)
    for name, ms, speed, ratio in rows:
        yield f"ladder: {name}", f"{ms}, {speed}, × {ratio}"
    if not find_spec("transformers"):
        yield "ladder: transformers", "not installed"


def modes(lab):
    compiled = ["--compile"] * (lab.cuda and not lab.tiny)
    for name, value in (("default", "0"), ("max-autotune-no-cudagraphs", "1")):
        steps = ["--max_steps=20", *compiled]
        printed = lab.train(f"mode_{name}", *steps, log=f"log_{name}", limit=150, TORCHINDUCTOR_MAX_AUTOTUNE=value)
        yield f"torch.compile: {name}", speed_of(printed)


def micro_batch(lab):
    size = 16 if lab.tiny else 512
    sizes = [f"--micro_batch_size={size}", f"--total_batch_size={size * (128 if lab.tiny else 1024)}", "--max_steps=2"]
    printed = lab.train("micro_batch", *sizes, log="log_micro_batch", limit=150)
    yield f"largest micro-batch, of {size} asked", found(r"steps of .*: (.*)", printed)


def peer(lab):
    code = (lab.peer / "train_gpt2.py").read_text()
    for old, new in PEER + PEER_TINY * lab.tiny:
        if code.count(old) < 1:
            raise Failed(f"{lab.peer}/train_gpt2.py has no line {old!r}")
        code = code.replace(old, new)
    folder = lab.folder / "peer"
    folder.mkdir(exist_ok=True)
    (folder / "train_gpt2.py").write_text(code)
    if not (folder / "edu_fineweb10B").exists():
        (folder / "edu_fineweb10B").symlink_to(lab.folder / "data")
    printed = lab.run("peer", "train_gpt2.py", folder=folder, limit=150)
    speeds = [float(s) for s in re.findall(r"tok/sec: ([\d.]+)", printed)][10:-1]
    yield "the tutorial's code, compile on", f"{statistics.median(speeds):,.0f} tokens/s"


def write(lab, rows, took):
    title = f"train_gpt2.py on {name_of(lab.device)}, {time.strftime('%Y-%m-%d')}"
    lines = [f"# {title}", "", "| what | result |", "|---|---|", *[f"| {what} | {text} |" for what, text in rows]]
    (lab.folder / "on_gpu.md").write_text("\n".join(lines) + "\n")
    content = {"title": title, "tiny": lab.tiny, "flags": lab.flags, "rows": rows, "seconds": took}
    (lab.folder / "on_gpu.json").write_text(json.dumps(content, indent=1) + "\n")


def main(args):
    lab = Lab(args.out.resolve(), args.minutes or (3 if args.quick else 8), args.tiny)
    lab.peer = args.peer and args.peer.resolve()
    if not lab.cuda and not args.tiny:
        say("no CUDA GPU: --tiny shows on any machine that this program works, without figures that mean anything")
        return
    lab.folder.mkdir(parents=True)  # a new one: nothing is overwritten
    parts = [machine, training, resume, *[peer] * bool(lab.peer)]
    parts += [tests, ladder, modes, micro_batch] * (not args.quick)
    rows, took = [], {}
    for part in parts:
        begin = time.monotonic()
        try:
            for row in part(lab):
                rows.append(row)
                say(f"{row[0]:45} {row[1]}")
        except Exception as error:  # of any kind: the other parts run
            rows.append((part.__name__, f"FAILED: {error} (see {lab.folder.name}/{part.__name__}*.txt)"))
            say(f"{part.__name__:45} {rows[-1][1]}")
        took[part.__name__] = round(time.monotonic() - begin, 1)
        write(lab, rows, took)
    say(f"written: {lab.folder}/on_gpu.md")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What only a GPU can show", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="3 minutes: training and a resume only")
    parser.add_argument("--minutes", type=float, help="other than 8, or 3")
    parser.add_argument("--peer", type=Path, help="a clone of build-nanogpt, to measure as well")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try this program on any machine")
    parser.add_argument("--out", type=Path, default="on_gpu", help="a new folder (default: %(default)s)")
    run_as_command(main, parser.parse_args())
