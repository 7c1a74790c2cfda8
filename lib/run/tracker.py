"""
Processes beside a run, which cannot stop it if they fail: one draws the curves, one sends every number that the console
shows to TensorBoard or wandb.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

from lib.console import say
from lib.files import ROOT

PATIENCE = 10  # seconds that a run waits for such a process at its end; the process then continues alone


def start_beside(*command, **streams):
    """Start a Python program at a low priority, out of reach of the signals that stop the run."""
    nice = ["nice", "-n", "19"] if shutil.which("nice") else []
    return subprocess.Popen([*nice, sys.executable, *command], cwd=ROOT, start_new_session=True, **streams)


def wait_for(process):
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process and process.wait(PATIENCE)


class Tracker:
    """kind: "tensorboard", "wandb" or "" for none. Its process ends with the run, however the run ends."""

    def __init__(self, kind):
        self.kind, self.process, self.stalled = kind, None, False

    def start(self, log_dir, step, settings):
        """Begin or continue the curves of log_dir at a step."""
        if self.kind:
            command = "-c", "from lib.run.tracker import follow; follow()", self.kind, Path(log_dir).absolute()
            self.process = start_beside(*command, stdin=subprocess.PIPE)
            os.set_blocking(self.process.stdin.fileno(), False)
            self.send(step, settings)

    def send(self, step, numbers):
        """Send the numbers of a step without waiting: the pipe holds about 500 records, any more are dropped."""
        try:
            if self.process:  # a write of so few bytes is atomic
                os.write(self.process.stdin.fileno(), json.dumps([step, numbers]).encode() + b"\n")
        except BlockingIOError:
            if not self.stalled:
                say(f"warning: {self.kind} cannot keep up at step {step}: it will miss records, log.txt has them all")
            self.stalled = True
        except BrokenPipeError:
            if wait_for(self.process) != 1:  # 1: it has printed the reason
                say(f"warning: the process of {self.kind} has ended: log.txt has every number")
            self.process = None

    def close(self):
        if self.process:
            self.process.stdin.close()
            wait_for(self.process)


def follow():
    """The process beside the run: forward its records until it ends."""
    kind, log_dir = sys.argv[1:]
    records = map(json.loads, os.fdopen(os.dup(0), "rb"))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # wandb starts processes, which would keep the pipe open
    try:
        step, settings = next(records)
        log, close = {"tensorboard": open_tensorboard, "wandb": open_wandb}[kind](Path(log_dir), step, settings)
        for step, numbers in records:
            log(step, numbers)
        close()
    except Exception as error:  # from any package involved
        say(f"warning: {kind} has failed, log.txt has every number: {type(error).__name__}: {error}")
        sys.exit(1)


def open_tensorboard(log_dir, step, settings):
    from torch.utils.tensorboard import SummaryWriter

    # what a killed run wrote from this step on is hidden
    writer = SummaryWriter(log_dir / "tensorboard", purge_step=step, flush_secs=10)
    writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()), step)

    def log(step, numbers):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def open_wandb(log_dir, step, settings):
    import wandb

    path = log_dir / "wandb_id.txt"
    if step == 0 or not path.exists():
        path.write_text(secrets.token_hex(4))
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "train_gpt2"), name=os.environ.get("WANDB_NAME", log_dir.name),
        dir=log_dir, id=path.read_text(), resume="allow", config=settings,
    )  # fmt: skip
    run.define_metric("*", step_metric="step")  # wandb's own steps cannot go back, as those of a resumed run do
    return (lambda step, numbers: run.log({"step": step, **numbers})), run.finish
