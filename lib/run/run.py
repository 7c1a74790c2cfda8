"""Bookkeeping around the training loop: steps, records, checkpoints, signals, and how a run ends."""

import contextlib
import copy
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from lib.checkpoint import check_plain, path_of, save_checkpoint, set_aside
from lib.console import Interrupted, Stopped, UserError, print0, say
from lib.distributed import from_rank_0, is_main_rank, wait_for_all
from lib.files import ROOT, atomic_write, hash_file
from lib.optimizers import parts_of, settings_of
from lib.run import summary
from lib.run.code import code_version
from lib.run.log import METRICS, Log, Stopwatch, number_of, time_text
from lib.run.resume import compare_runs, restore
from lib.run.signals import catch_signals
from lib.run.tracker import Tracker

PATIENCE = 10  # seconds that a run waits at its end for the program beside it
# the entries of a checkpoint that are Run's own
OWN = ("step", "tokens", "val_loss", "nonfinite", "seconds", "script", "commit", "optimizer_settings")


def seed_step(seed, step, rank):
    """Seed torch, numpy and Python for each step and rank: a resume draws the same numbers again, and no two ranks draw
    the same."""
    own = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    for start in (torch.manual_seed, np.random.seed, random.seed):
        start(own)


class Run:
    """A run, from its checkpoint on, or from step 0 without one.

    script: the path of the training script. contents: what a checkpoint holds besides OWN, by name: objects with a
    state_dict, which a resume restores, and plain data. checkpoint: the contents of one, which the run continues.

    step: optimizer steps done; tokens: those trained on; metrics: the latest of each; saved: the path of the last
    checkpoint, False if it could not be written, None if none was due yet.
    """

    def __init__(self, script, folder, contents, checkpoint):
        if taken := [name for name in OWN if name in contents]:
            raise UserError(f"{', '.join(taken)}: a checkpoint has an entry of that name already, choose another")
        self.folder = folder
        self.settings = contents["train_config"]
        self.max_steps = self.settings["max_steps"]
        self.parts = {name: part for name, part in contents.items() if hasattr(part, "state_dict")}
        self.facts = {name: part for name, part in contents.items() if name not in self.parts}
        script = [Path(script).name, hash_file(script)]  # by which tools find the model of a checkpoint
        self.facts |= {"script": script, "commit": code_version()}
        self.facts["optimizer_settings"] = settings_of(contents["optimizer"])
        self.step = self.tokens = self.nonfinite = 0
        self.metrics = {"val_loss": None}
        self.before_due = None  # the states before what is due at this step
        self.clock = Stopwatch()
        self.timed_from = 0
        self.saved = self.resumed_at = self.beside = self.log = self.samples = self.tracker = self.caught = None
        if checkpoint:
            self.resume(checkpoint)
        self.check_contents()
        if is_main_rank():
            self.open_logs()
        wait_for_all()  # a tracker may take a while to start

    def resume(self, checkpoint):
        changes = compare_runs(checkpoint, self.facts)
        self.step = checkpoint["step"]
        self.tokens = checkpoint.get("tokens", self.step * self.settings["total_batch_size"])
        self.nonfinite = checkpoint.get("nonfinite", 0)
        self.metrics["val_loss"] = checkpoint.get("val_loss")
        self.saved = path_of(self.folder.path, self.step)
        self.resumed_at = self.step, self.metrics["val_loss"]
        self.clock.update(checkpoint.get("seconds", {}))
        self.timed_from = 0 if "seconds" in checkpoint else self.tokens
        restore(checkpoint, self.parts)
        checkpoint.clear()  # frees its memory, whoever else still has a name for it
        print0(f"resuming at step {self.step}{changes}")

    def open_logs(self):
        """Start recording at this step, in log.txt, in samples.txt, and with the tracker."""
        path = self.folder.path
        try:
            with atomic_write(path / "config.json") as file:
                file.write(json.dumps(self.settings, indent=1, default=str).encode() + b"\n")
        except OSError as error:
            say(f"warning: {path}/config.json cannot be written: {error}")
        size = 12 * sum(p.numel() for p in self.parts["model"].parameters())  # weights and two moments in float32
        needed = 2 * size  # the checkpoint before is removed when the next one is complete
        if (free := shutil.disk_usage(path).free) < needed:
            say(f"WARNING: {path}/ has {free / 1e6:,.0f} MB free, two checkpoints take {needed / 1e6:,.0f}: make room")
        self.log = Log(path / "log.txt", self.step)
        self.samples = Log(path / "samples.txt", self.step)
        self.tracker = Tracker(self.settings.get("tracker"), path, self.step, self.settings)
        for part in (self.log, self.samples, self.tracker):
            self.folder.stack.callback(part.close)

    def steps(self):
        """Yield the steps from here to max_steps, inclusive: the last weights are evaluated and saved, too."""
        first = self.step
        if self.folder.resume and self.saved is None:
            began = self.settings["init_from"]
            print0(f"no checkpoint in {self.folder.path.absolute()}/ yet: starting at step 0, from {began}")
        self.folder.on_stop = self.save_stopped
        self.caught = catch_signals()  # before, there is nothing to save
        for step in range(first, self.max_steps + 1):
            self.step = step
            self.before_due = None
            self.check_stop()
            yield step
            if step == first:
                self.check_contents()  # again, since most optimizers have their state now

    def due(self, every):
        """Whether something done every so many steps before the update is due at this one; at the last step, everything
        is. The checkpoint of a step holds the states before all of that, so a resume does it again from the same."""
        is_due = every > 0 and (self.step % every == 0 or self.step == self.max_steps)
        if is_due and self.before_due is None:  # model and optimizer change in the update only, but for buffers
            others = [name for name in self.parts if name not in ("model", "optimizer")]
            self.before_due = {name: copy.deepcopy(self.parts[name].state_dict()) for name in others}
            model = self.parts["model"]
            kept = model.state_dict().keys()
            self.before_due["model"] = {name: b.clone() for name, b in model.named_buffers() if name in kept}
        return is_due

    def say(self, message):
        """Print a line on rank 0, with the step in front."""
        print0(f"step {self.step:5d} | {message}")

    def show_samples(self, texts):
        """Add texts that the model wrote to samples.txt, and print a line of each, but for those of random weights."""
        for text in texts:
            if self.step:
                self.say(f"sample {text!r:.75}")
            self.samples.record(self.step, {"sample": repr(text)})

    def record(self, **values):
        """Record numbers of this step, by kind, in log.txt and with the tracker. Anything that is a number will do:
        tensors of one element, numpy's; None is left out. Raises UserError for anything else."""
        values = {kind: number_of(kind, value) for kind, value in values.items() if value is not None}
        if "val" in values and self.tokens != self.step * self.settings["total_batch_size"]:
            values["tokens"] = self.tokens  # the batch has changed on the way
        named = {METRICS.get(kind, kind): value for kind, value in values.items()}
        self.metrics |= named
        if is_main_rank():
            self.log.record(self.step, values)
            self.tracker.send(self.step, named)

    def step_line(self, loss, lr, norm, finite, speed, mfu):
        """The console's line of a step. speed: tokens/s; mfu: None if the peak of the device is not known."""
        left = time_text(statistics.median(self.clock.recent) * max(0, self.max_steps - self.step - 1))
        return (
            f"step {self.step:5d}/{self.max_steps} | loss {loss:.6f} | lr {lr:.4e} | norm {norm:.4f} | "
            f"{1000 * self.clock.last:.2f} ms | {speed:,.0f} tok/s | {f'MFU {mfu:.1%} | ' if mfu else ''}{left} left"
            + ("" if finite else " | UPDATE SKIPPED, NOT FINITE")
        )

    def count(self, tokens, finite):
        """Count the tokens of a step, and the consecutive steps whose update was skipped. After max_nonfinite of these,
        end the run and set their checkpoints aside, so that a resume starts before them."""
        self.tokens += tokens
        self.nonfinite = 0 if finite else self.nonfinite + 1
        if self.nonfinite < self.settings.get("max_nonfinite", 5):
            return
        first = self.step + 1 - self.nonfinite
        before = from_rank_0(str(set_aside(self.folder.path, first) or "step 0") if is_main_rank() else None)
        raise UserError(
            f"loss or gradient was NaN or infinite in steps {first}-{self.step}: try a lower max_lr or --dtype "
            f"float32, and --init_from resume, which continues from {before}"
        )

    def contents(self):
        """What a checkpoint of this step holds: the states before what is due at it. To be called on all ranks, since
        an optimizer may have spread its state over them; complete on rank 0."""
        states = {}
        for name, part in self.parts.items():
            collected = [p for p in parts_of(part) if hasattr(p, "consolidate_state_dict")]
            for optimizer in collected:
                optimizer.consolidate_state_dict(to=0)
            if is_main_rank() or not collected:
                states[name] = part.state_dict()
        if self.before_due is not None:
            states |= {**self.before_due, "model": states["model"] | self.before_due["model"]}
        states |= {**self.facts, "step": self.step, "tokens": self.tokens, "nonfinite": self.nonfinite}
        return {**states, "val_loss": self.metrics["val_loss"], "seconds": dict(self.clock)}

    def check_contents(self):
        """Raise UserError, with its name, for an entry that a checkpoint cannot hold: now, not after a day."""
        contents = self.contents()
        if is_main_rank():
            for name, value in contents.items():
                check_plain(value, name)

    def save(self):
        """Save a checkpoint; if that fails, warn and go on. The other ranks wait, for as long as a slow disk takes."""
        if (self.step, self.metrics["val_loss"]) == self.resumed_at:
            return  # it was just read
        with self.clock.timing("checkpoints"):
            contents = self.contents()
            if is_main_rank():
                self.log.flush(sync=True)  # a checkpoint is never ahead of the log
                # while updates are skipped, keep the older ones: the current weights may be broken
                keep = None if self.nonfinite else self.settings.get("keep_checkpoints", 3)
                self.saved = save_checkpoint(self.folder.path, contents, keep)
            wait_for_all()

    def start_beside(self, *command):
        """Start a Python program at a low priority, out of reach of the signals that stop the run, unless the last one
        is still at work. The end of the run waits for it."""
        if self.step == self.max_steps:
            self.wait_beside()
        if self.beside and self.beside.poll() is None:
            return
        nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = [sys.executable, *map(str, command)]
        try:
            self.beside = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **nowhere)
            os.setpriority(os.PRIO_PROCESS, self.beside.pid, 19)
        except OSError as error:
            say(f"warning: cannot start {shlex.join(command)}: {error}")
        self.folder.stack.callback(self.wait_beside)

    def wait_beside(self):
        with contextlib.suppress(subprocess.TimeoutExpired):  # it then continues alone
            if self.beside:
                self.beside.wait(PATIENCE)

    def check_stop(self):
        """Raise Stopped, on all ranks together, if any of them received a signal to stop. The run is saved on the way
        out, when evaluations have put back what they changed."""
        if number := self.caught():
            raise Interrupted(number) if number == signal.SIGINT else Stopped(number)

    def save_stopped(self):
        self.save()
        self.check_saved()
        print0("stopped by a signal. To resume, give the same command with --init_from resume")

    def check_saved(self):
        """Raise UserError unless the last checkpoint and all of log.txt are on the disk."""
        path = self.folder.path
        if not is_main_rank():
            return
        if not path.is_dir():
            raise UserError(f"{path}/ no longer exists: start again, or restore it and resume")
        if self.saved is False or not self.log.flush(sync=True):
            raise UserError(
                f"the last checkpoint could not be saved, or not all of log.txt: make room in {path}/ and resume"
            )

    def finish(self, devices, changed, scored):
        """Print the results of a finished run, write them to log_dir/summary.md, and suggest what to do next. changed:
        settings that are not the defaults, as text. Returns the last metrics."""
        self.check_saved()
        self.folder.on_stop = None  # all is saved
        self.metrics |= {"step": self.step, "tokens": self.tokens}
        print0(f"done: {self.clock}")
        if is_main_rank():
            self.summarize(devices, changed, scored)
        wait_for_all()
        self.check_stop()  # a signal that came during the last samples, or now
        return self.metrics

    def summarize(self, devices, changed, scored):
        parameters = sum(p.numel() for p in self.parts["model"].parameters())
        rows = summary.results(self.metrics, self.clock, parameters, self.timed_from)
        for what, value in rows:
            say(f"{what}: {value}")
        path = self.folder.path
        self.wait_beside()
        try:
            summary.write_page(path, f"GPT-2 on {devices}", rows, changed, self.facts["commit"])
        except OSError as error:
            say(f"warning: {path}/summary.md cannot be written: {error}")
        if self.saved:
            names = [name for name in ("summary.md", "curve.png", "samples.txt") if (path / name).exists()]
            say(f"Output in {path}/: {', '.join(['checkpoints', 'log.txt', *names])}")
            checkpoint = shlex.quote(str(self.saved))
            prompt = shlex.quote(self.settings.get("sample_prompt", ""))
            score = f"; python hellaswag.py -m {checkpoint}" if scored else ""
            say(f"next: python -m tools.sample {checkpoint} --prompt={prompt}{score}")
