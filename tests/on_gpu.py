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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.console import UserError, run_as_command, say  # noqa: E402

MICRO_BATCH = r"steps of .*? tokens: (.*)"
PEER = (  # settings of the tutorial's script that this measurement changes: steps, compile, no downloads
    ("max_steps = 19073", "max_steps = 30"), ("use_compile = False", "use_compile = True"),
    ('enc = tiktoken.get_encoding("gpt2")', "enc = None"), ("from hellaswag import", "# from hellaswag import"),
)  # fmt: skip
PEER_TINY = (
    ("total_batch_size = 524288", "total_batch_size = 1024"), ("B = 64", "B = 8"), ("T = 1024", "T = 128"),
    ("GPTConfig(vocab_size=50304)", "GPTConfig(vocab_size=50304, n_layer=4, n_head=4, n_embd=48)"),
)  # fmt: skip


PROBE = """
import json, torch
from lib.device import attention_kernel, default_device, name_of, peak_tflops
device = torch.device(default_device())
found = {"name": name_of(device), "cuda": device.type == "cuda", "torch": torch.__version__}
if found["cuda"]:
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    found |= {"peak": peak_tflops(found["name"]), "memory": torch.cuda.get_device_properties(0).total_memory}
    found |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    found["kernel of attention"] = attention_kernel(12, 1024, 64, dtype, device)
print(json.dumps(found))
"""


class Failed(Exception):
    """A part that could not be measured; printed: by the program that did not finish."""

    printed = ""


class Lab:
    """Runs programs one after another and keeps what they print. This process never touches the GPU."""

    def __init__(self, args):
        self.folder, self.tiny, self.peer = args.out.resolve(), args.tiny, args.peer and args.peer.resolve()
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"{args.out} exists: give another --out") from None
        self.end = time.monotonic() + 60 * (args.minutes or (3 if args.quick else 8))
        self.found = json.loads(self.run("found", "-c", PROBE, limit=60))
        peak = self.found.get("peak") or 0
        tokens = 2**19 if peak >= 700 else 2**17 if peak >= 140 else 2**15  # a step of a second or two
        self.steps = 30 if args.quick else 60
        self.flags = [f"--total_batch_size={tokens}", f"--max_steps={self.steps}", "--warmup_steps=20"]
        if self.tiny:
            self.flags = ["--preset=demo", f"--max_steps={self.steps}", "--warmup_steps=4", "--log_every=1"]

    def run(self, name, *command, limit, folder=ROOT, **env):
        """Run a Python program, at most `limit` seconds and the time that is left. Returns what it printed."""
        limit = min(limit, self.end - time.monotonic())
        if limit < 10:
            raise Failed("skipped, no time was left")
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(self.folder / f"{name}.txt", "w+", encoding="utf-8", errors="replace") as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                cwd=folder, env={**os.environ, "PYTHONPATH": path, **env}, start_new_session=True,
            )  # fmt: skip
            late = False
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                late = True
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()  # the next part finds the memory free
            output.seek(0)
            text = output.read()
        if late or process.returncode:
            last = text.strip().rpartition("\n")[2]
            failed = Failed(f"not finished after {limit:.0f} s" if late else f"exit code {process.returncode}, {last}")
            failed.printed = text
            raise failed
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
    found = dict(lab.found)
    yield found.pop("name"), f"torch {found.pop('torch')}, Python {sys.version.split()[0]}"
    if found.pop("cuda"):
        ask = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        try:
            lines = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split("\n")
        except (OSError, subprocess.CalledProcessError):
            lines = ["unknown"]
        yield "driver, power limit", lines[0]
        yield "memory", f"{found.pop('memory') / 2**30:.1f} GiB"
        yield "peak by datasheet", f"{found.pop('peak') or 'unknown:'} TFLOP/s"
        yield from found.items()


def training(lab):
    half = lab.steps // 2
    every = [f"--val_every={half}", f"--sample_every={half}", f"--checkpoint_every={lab.steps}"]
    every += ["--val_tokens=8192"] if lab.tiny else ["--val_tokens=655360", f"--hellaswag_every={lab.steps}"]
    printed = lab.train("training", *every, limit=240, TORCH_LOGS="recompiles,graph_breaks")
    before, after = re.split(r"step +0/\d+ ", printed, maxsplit=1)
    yield f"{lab.steps} steps with all evaluations", speed_of(printed)
    yield "run", f"{found(r'(GPT-2, .*)', before)}; {found(MICRO_BATCH, before)}"
    yield "recompilations after step 0, broken graphs", f"{after.count('Recompiling')}, {printed.count('Graph break')}"
    yield "memory of training", found(r"memory \| (.*)", printed)
    losses = re.findall(r"step +(\d+) \| val loss ([\d.]+)", printed)
    yield "validation loss, by step", ", ".join(f"{step}: {loss}" for step, loss in losses)
    yield "HellaSwag at the end", found(rf"step +{lab.steps} \| HellaSwag ([\d.]+)", printed)


def resume(lab):
    printed = lab.train("resume", f"--max_steps={lab.steps + 5}", "--init_from=resume", limit=90)
    step, loss = found(r"(resuming at step \d+)", printed), found(rf"step +{lab.steps}/\d+ \| loss ([\d.]+)", printed)
    yield "resume", f"{step}, loss {loss}"


def peer(lab):
    code = (lab.peer / "train_gpt2.py").read_text()
    for old, new in PEER + PEER_TINY * lab.tiny:
        if old not in code:
            raise Failed(f"{lab.peer}/train_gpt2.py has no line {old!r}")
        code = code.replace(old, new)
    shards = lab.folder / "peer" / "edu_fineweb10B"
    shards.mkdir(parents=True)
    for path in (lab.folder / "data").glob("*.npy"):
        if path.stat().st_size > 2 * 64 * 1024 + 1024:  # it cannot read a batch from shorter ones
            (shards / path.name).symlink_to(path)
    (shards.parent / "train_gpt2.py").write_text(code)
    printed = lab.run("peer", "train_gpt2.py", folder=shards.parent, limit=150)
    speeds = [float(s) for s in re.findall(r"tok/sec: ([\d.]+)", printed)][10:-1]
    yield "the tutorial's code, compile on", f"{statistics.median(speeds):,.0f} tokens/s"


def ladder(lab):
    batch = 2 if lab.tiny else 16 if lab.found.get("memory", 0) > 40e9 else 4
    try:
        printed = lab.run("ladder", "-m", "tools.bench", f"--batch={batch}", limit=150)
    except Failed as error:
        printed = error.printed
        yield "ladder", f"{error}: the rows until then"
    for row in re.findall(r"^(\S.*?)  +([\d.]+ ms) +([\d,]+ tokens/s) +x ([\d.]+)", printed, re.M):
        yield f"ladder: {row[0]}", f"{row[1]}, {row[2]}, × {row[3]}"
    if not find_spec("transformers"):
        yield "ladder: transformers", "not installed"


def micro_batch(lab):
    size, length = (16, 128) if lab.tiny else (256, 1024)
    sizes = [f"--micro_batch_size={size}", f"--total_batch_size={size * length}", "--max_steps=2"]
    printed = lab.train("micro_batch", *sizes, log="log_micro_batch", limit=120)
    yield f"largest micro-batch, of {size} asked", found(MICRO_BATCH, printed)


def modes(lab):
    for name, value in (("default", "0"), ("max-autotune-no-cudagraphs", "1")):
        steps = ["--max_steps=20", f"--log_dir={lab.folder / f'log_{name}'}"]
        printed = lab.train(f"modes_{name}", *steps, limit=150, TORCHINDUCTOR_MAX_AUTOTUNE=value)
        yield f"torch.compile: {name}", f"{speed_of(printed)}, {found(r'(compile o[a-z]+)', printed)}"


def tests(lab):
    printed = lab.run("tests", "-m", "pytest", "-v", "-o", "addopts=", "-m", "gpu", "tests/test_gpu.py", limit=300)
    yield "tests marked gpu", printed.strip().splitlines()[-1].strip("= ")


def write(lab, rows, took):
    title = f"train_gpt2.py on {lab.found['name']}, {time.strftime('%Y-%m-%d')}"
    lines = [f"# {title}", "", "| what | result |", "|---|---|"]
    lines += [f"| {what} | {str(text).replace('|', '/')} |" for what, text in rows]
    (lab.folder / "on_gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    content = {"title": title, "tiny": lab.tiny, "flags": lab.flags, "rows": rows, "seconds": took}
    (lab.folder / "on_gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(args):
    lab = Lab(args)
    if not lab.found["cuda"] and not args.tiny:
        raise UserError("no CUDA GPU: --tiny shows on any machine that this program works, without figures that count")
    parts = [machine, training, resume, *[peer] * bool(lab.peer)]
    parts += [ladder, micro_batch, modes, tests] * (not args.quick)
    rows, took = [], {}
    for part in parts:
        begin = time.monotonic()
        try:
            for row in part(lab):
                rows.append(row)
                say(f"{row[0]:45} {row[1]}")
        except Exception as error:  # of any kind: the other parts run
            rows.append((part.__name__, f"NOT MEASURED: {error} (see {part.__name__}*.txt)"))
            say(f"{part.__name__:45} {rows[-1][1]}")
        took[part.__name__] = round(time.monotonic() - begin, 1)
        write(lab, rows, took)
    say(f"written: {lab.folder}/on_gpu.md")


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: no program is left on the GPU
        signal.signal(number, signal.default_int_handler)
    parser = argparse.ArgumentParser(description="What only a GPU can show", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="3 minutes: training, a resume, and --peer only")
    parser.add_argument("--minutes", type=float, help="other than 8, or 3")
    parser.add_argument("--peer", type=Path, help="a clone of build-nanogpt, to measure as well")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try this program on any machine")
    parser.add_argument("--out", type=Path, default="on_gpu", help="a new folder (default: %(default)s)")
    run_as_command(main, parser.parse_args())
