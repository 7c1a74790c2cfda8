"""
The life of a run: its ranks, device, folder, log, checkpoints, signals and clock. Nothing here knows of GPT.
"""

import contextlib
import os
from pathlib import Path

import torch

from lib import checkpoint as checkpoints
from lib import machine
from lib.common import InputError, git_commit, lock_folder, report, say
from lib.knobs import compare_runs
from lib.log import METRICS, Log, cut_log, rates
from lib.restore import restore
from lib.signals import StopRun, stop_signals


class Run:
    """`with Run(...) as run:` joins torchrun's ranks and handles every way out: the end, a signal, an error.

    step: optimizer steps done; nonfinite: how many of the last ones in a row had no finite loss and gradient, and were
    skipped; metrics: the latest of each.
    """

    def __init__(self, log_dir, device, resume, keep_checkpoints, max_nonfinite, collective_timeout):
        self.log_dir, self.resume, self.keep_checkpoints = Path(log_dir), resume, keep_checkpoints
        self.max_nonfinite, self.collective_timeout, self.requested_device = max_nonfinite, collective_timeout, device
        self.step, self.nonfinite, self.metrics = 0, 0, {"val_loss": None}
        self.clock, self.stack, self.saved = machine.Stopwatch(), contextlib.ExitStack(), None

    # ---- in and out

    def __enter__(self):
        ranks = machine.distributed(self.requested_device, self.collective_timeout)
        self.rank, self.local_rank, self.world_size, self.device = self.stack.enter_context(ranks)
        self.device_name, self.peak_tflops = machine.name_and_peak(self.device)
        self.check_stop = self.stack.enter_context(stop_signals(self.device))
        # a restart by torchrun --max-restarts resumes by itself, also on the machines whose own count is still 0
        restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device=self.device)
        self.restarted = machine.sum_over_ranks(restarts).item() > 0
        if not self.restarted:
            self.refuse_other_run()
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, StopRun):
            self.save()
            self.say(f"{error}. To go on, give the same command with --init_from resume")
            self.metrics["signal"] = int(error.number)
            self.check_saved()
        elif error and self.world_size > 1:
            os._exit(report(error))  # at once: leaving the ranks in order would wait for those that wait for this one
        elif error:
            return self.stack.__exit__(kind, error, trace)
        self.metrics["step"] = self.step
        self.stack.close()
        return True

    # ---- the folder

    def refuse_other_run(self):
        has_log = (self.log_dir / "log.txt").exists()
        if not self.resume and (has_log or (self.log_dir.is_dir() and checkpoints.list_checkpoints(self.log_dir))):
            raise InputError(
                f"{self.log_dir}/ holds a run: give --init_from resume, delete it, or give another --log_dir"
            )

    def open_folder(self):
        """Hold the folder, and return the newest checkpoint in it where the run resumes, else None.

        Raises InputError where it holds a run that neither this one nor its first attempt under torchrun began.
        """
        newest = None
        if self.rank == 0:
            launch = f", torchrun {os.environ['TORCHELASTIC_RUN_ID']}" if "TORCHELASTIC_RUN_ID" in os.environ else ""
            before = self.stack.enter_context(lock_folder(self.log_dir, launch))
            self.resume = self.resume or (self.restarted and launch and before.endswith(launch))
            self.refuse_other_run()
            newest = checkpoints.newest_whole_checkpoint(self.log_dir) if self.resume else None
            self.log = self.stack.enter_context(contextlib.closing(Log(self.log_dir / "log.txt")))
        newest = machine.from_rank_0(newest)
        return checkpoints.load_checkpoint(newest) if newest else None

    def begin(self, checkpoint, stateful, settings):
        """Continue from the checkpoint; without one, begin at step 0.

        stateful: what has a state_dict, by name; settings: plain data that says what run it is. Both go into every
        checkpoint.
        """
        self.stateful, self.settings = stateful, {**settings, "commit": git_commit()}
        if checkpoint:
            changes = compare_runs(checkpoint, settings, checkpoint["step"])
            self.step, self.nonfinite = checkpoint["step"], checkpoint.get("nonfinite", 0)
            self.metrics["val_loss"] = checkpoint.get("val_loss")
            restore(checkpoint, stateful)
            self.say(f"resuming at step {self.step}{changes}")
        elif self.resume:
            self.say(f"no checkpoint in {self.log_dir}/ yet: starting at step 0")
        if self.rank == 0:
            cut_log(self.log_dir / "log.txt", self.step)

    def save(self):
        """Save a checkpoint of the steps done; says so where that fails, and the run goes on."""
        with self.clock.timing("checkpoints"):
            if self.rank == 0 and self.log.flush(sync=True):  # the log is never behind a checkpoint
                contents = {name: part.state_dict() for name, part in self.stateful.items()}
                contents |= {**self.settings, "step": self.step, "nonfinite": self.nonfinite}
                contents |= {"val_loss": self.metrics["val_loss"], "random_states": [torch.get_rng_state()]}
                # while updates are skipped, the older ones stay: these weights may be what is wrong
                saved = checkpoints.save_checkpoint(self.log_dir, contents, self.keep_checkpoints, not self.nonfinite)
                self.saved = saved and self.log_dir / f"model_{self.step:05d}.pt"

    def check_saved(self):
        """Raise InputError where what the run became is not all on the disk."""
        if self.rank == 0 and (self.saved is False or not self.log.flush(sync=True)):
            raise InputError(f"the last checkpoint could not be saved: make room for it in {self.log_dir}/ and resume")

    def diverged(self):
        """Set the checkpoints of the steps that were skipped aside: a resumed run begins before them."""
        first = self.step - self.nonfinite
        before = checkpoints.set_aside(self.log_dir, first) if self.rank == 0 else None
        raise InputError(
            f"not finite in {self.nonfinite} steps in a row up to step {self.step - 1}: try a lower max_lr or --dtype "
            f"float32, and --init_from resume, which goes on from {before or 'step 0'}"
        )

    # ---- step by step

    def steps(self, max_steps, tokens, flops_per_token):
        """Count the steps from here to max_steps, inclusive: the last weights are evaluated and saved, too. `tokens` of
        a step and `flops_per_token` are for its speed on the console."""
        first, self.max_steps, self.tokens_per_step, self.flops_per_token = (
            self.step,
            max_steps,
            tokens,
            flops_per_token,
        )
        for step in range(first, max_steps + 1):
            self.step = step
            self.check_stop()
            if self.nonfinite >= self.max_nonfinite:
                self.diverged()
            yield step
            if step == first:
                machine.set_timeout(self.collective_timeout)

    def due(self, every):
        """Whether this step is one of every so many, or the last."""
        return every > 0 and (self.step % every == 0 or self.step == self.max_steps)

    def timing(self, what):
        return self.clock.timing(what)

    def say(self, message):
        if self.rank == 0:
            say(message)

    def record(self, kind, value, more=""):
        """Record a metric of this step: "train", "val" or "hella"."""
        self.metrics[METRICS[kind].name] = value
        if self.rank == 0:
            self.log.record(self.step, kind, value, f"/{self.max_steps}" if kind == "train" else "", more)

    def record_step(self, loss, norm, lr, finite):
        """Record an optimizer step, and count those in a row whose update was skipped."""
        self.nonfinite = 0 if finite else self.nonfinite + 1
        seconds, peak = self.clock.last, self.world_size * (self.peak_tflops or 0)
        text = rates(seconds, self.tokens_per_step, self.flops_per_token, peak, self.max_steps - self.step - 1)
        note = "" if finite else " | UPDATE SKIPPED, NOT FINITE"
        self.record("train", loss, f" | lr {lr:.4e} | norm {norm:.4f} | {text}{note}")

    def finish(self, hint):
        """The last words of a run that came to its end; `hint` says what to do with its last {checkpoint}."""
        self.check_saved()
        self.say(f"done: {self.clock}. All is in {self.log_dir}/")
        if self.saved:
            self.say(f"next: {hint.format(checkpoint=self.saved)}")
