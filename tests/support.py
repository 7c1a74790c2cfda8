"""What the tests share: a tiny run, its shards, and the scripts run as a user runs them."""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the programs among the tests, which pytest does not start

import train_gpt2  # noqa: E402
from lib.checkpoint import load_checkpoint  # noqa: E402

PROBES = ROOT / "tests" / "probes"
OURS = ("lib", "tools", "train_gpt2", "fineweb", "hellaswag")

TINY = dict(
    n_layer=2, n_head=2, n_embd=32, vocab_size=512, sequence_length=32, total_batch_size=512, micro_batch_size=4,
    max_steps=20, warmup_steps=2, max_lr=1e-2, val_every=5, val_tokens=1000, hellaswag_every=0, sample_every=0,
    plot_every=0, checkpoint_every=10, device="cpu",
)  # fmt: skip


def write_shards(folder, lengths, vocab_size=512, seed=0, name="tiny"):
    """Shards of text with something to learn: each token follows from the one before, plus noise. Returns the stream
    of train tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shards = []
    for index, length in enumerate(lengths):
        noise = rng.integers(0, 4, length)
        tokens = ((np.cumsum(noise) * 7) % vocab_size).astype("<u2")
        np.save(folder / f"{name}_{'val' if index == 0 else 'train'}_{index:06d}.npy", tokens)
        shards.append(tokens)
    return np.concatenate(shards[1:])


@contextlib.contextmanager
def disk(folder, size, *options):
    """A real file system of `size` bytes at folder; options: others of mount."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("it takes the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def make_items(count, seed=0):
    """HellaSwag items in random words."""
    rng = random.Random(seed)
    words = ["the", "a", "man", "dog", "roof", "runs", "sits", "on", "under", "quickly", "then", "she", "opens", "door"]

    def text(low, high):
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    return [
        {"ctx": text(3, 60), "label": rng.randrange(4), "endings": [text(1, 25) for _ in range(4)]}
        for _ in range(count)
    ]


def write_items(path, count):
    path.write_text("".join(json.dumps(item) + "\n" for item in make_items(count)))


def command_of(script, *args, ranks=0, restarts=0):
    """The command line of a script, under torchrun where ranks are given; a machine's own name need not resolve."""
    torchrun = f"--standalone --local-addr=127.0.0.1 --nproc_per_node={ranks} --max-restarts={restarts}".split()
    return [
        sys.executable,
        *(["-m", "torch.distributed.run", *torchrun] if ranks else []),
        str(ROOT / script),
        *map(str, args),
    ]


def environment(**extra):
    """One thread a rank: two processes whose OpenMP threads spin on two cores run many times slower. torchrun waits 5 s
    for ranks that do not stop instead of 30."""
    settings = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5", "PYTHONPATH": str(ROOT)}
    if sys.platform == "linux":
        settings["GLOO_SOCKET_IFNAME"] = "lo"
    return {**os.environ, **settings, **extra}


def run(script, *args, ranks=0, cwd=None, env=None, timeout=150):
    """Run a script as a user does; returns the CompletedProcess, stderr in its stdout."""
    return subprocess.run(
        command_of(script, *args, ranks=ranks), cwd=cwd or ROOT, env=environment(**(env or {})),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
    )  # fmt: skip


def run_script(script, args, env, output, folder):
    """In a process that was forked from one in which torch is loaded already: what `python script args` does, in a
    folder with a copy of the scripts if one is given."""
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(env)
    if folder:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
            del sys.modules[name]
    sys.argv = [script, *args]
    runpy.run_path(script, run_name="__main__")


def run_warm(script, *args, env=None, timeout=150, ranks=0, folder=None):
    """As `run`, four times as fast: for promises that are not about how a program starts. With ranks, there is no
    torchrun; if one rank fails, the others are killed, as by torchrun."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fineweb", "train_gpt2", "torch._dynamo"])  # the last is of the first optimizer
    with contextlib.chdir(ROOT):  # where the server begins, and finds them
        multiprocessing.forkserver.ensure_running()
    with tempfile.NamedTemporaryFile() as output, socket.socket() as port:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        group |= {"MASTER_PORT": port.getsockname()[1]}
        port.close()
        processes = []
        for rank in range(max(1, ranks)):
            of_rank = {**group, "RANK": rank, "LOCAL_RANK": rank} if ranks else {}
            settings = {name: str(value) for name, value in {**of_rank, **(env or {})}.items()}
            work = (str(ROOT / script), [str(arg) for arg in args], settings, output.name, folder)
            processes.append(context.Process(target=run_script, args=work))
            processes[-1].start()
        end = time.monotonic() + timeout
        while any(process.exitcode is None for process in processes) and time.monotonic() < end:
            multiprocessing.connection.wait([p.sentinel for p in processes if p.exitcode is None], timeout=1)
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.kill()
        code = next((p.exitcode for p in processes if p.exitcode not in (0, -signal.SIGKILL)), processes[0].exitcode)
        assert code is not None, "it did not end in time: " + Path(output.name).read_text()
        return subprocess.CompletedProcess(args, code, Path(output.name).read_text(errors="replace"))


def flags_of(config, **overrides):
    """The command line of a TrainConfig, whose switches stay as they are by default."""
    return [f"--{k}={v}" for k, v in {**asdict(config), **overrides}.items() if not isinstance(v, bool | None)]


def read_log(log_dir):
    return (Path(log_dir) / "log.txt").read_text()


def losses(log_dir, kind):
    """The records of a kind in log.txt, by step."""
    return {int(s): float(value) for s, value in re.findall(rf"^(\d+) {kind} (\S+)$", read_log(log_dir), re.M)}


def load(path):
    return torch.load(path, weights_only=True)


def at_step(monkeypatch, steps, action):
    """Call action() inside these optimizer steps of a run in this process."""
    original = train_gpt2.get_lr

    def get_lr(step, config):
        if step in steps:
            action()
        return original(step, config)

    monkeypatch.setattr(train_gpt2, "get_lr", get_lr)


def crash():
    raise MemoryError("a crash, for the test")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def assert_same(a, b, path=""):
    """Bit for bit the same plain data."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def assert_same_run(a, b, step):
    assert read_log(a) == read_log(b)
    a, b = (load_checkpoint(folder / f"model_{step:05d}.pt") for folder in (a, b))
    for name in ("model", "optimizer", "scaler", "step", "val_loss", "tokens", "config", "data"):
        assert_same(a[name], b[name], name)


def start(config, ranks=0, restarts=0, script="train_gpt2.py", **env):
    """A run in the background, its output in a pipe."""
    command = command_of(script, *flags_of(config), ranks=ranks, restarts=restarts)
    return subprocess.Popen(
        command, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def read_until(process, pattern):
    """Read the output up to a line that matches; returns all of it."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    raise AssertionError("the run ended before that: " + "".join(lines))


def ranks_of(process):
    """The process ids of torchrun's workers."""
    return [child.pid for child in psutil.Process(process.pid).children()]


def finish(process, timeout=150):
    output, _ = process.communicate(timeout=timeout)
    return output
