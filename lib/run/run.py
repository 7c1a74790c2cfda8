"""
The life of a run: ranks, device, folder, signals, clock, and every way out. Nothing here knows of GPT.
"""

import contextlib
import os
import shlex

import torch

from lib import device as devices
from lib import distributed
from lib.checkpoint import load_checkpoint
from lib.console import UserError, report, say
from lib.run import checkpoints
from lib.run.folder import RunFolder, git_commit
from lib.run.log import METRICS, Stopwatch, rates
from lib.run.resume import compare_runs, restore, tensors_of
from lib.run.signals import StopRun, handlers_restored, short_shutdown, stop_on_signals


class Run:
    """`with Run(...) as run:` joins torchrun's ranks, and leaves them in order after the end, a signal or an error.

    step: optimizer steps done; nonfinite: how many of the last ones in a row were skipped, having no finite loss and
    gradient; metrics: the latest of each.
    """

    def __init__(self, log_dir, device, resume, keep_checkpoints, max_nonfinite, collective_timeout, tracker):
        self.folder, self.resume = RunFolder(log_dir, keep_checkpoints, tracker), resume
        self.requested_device, self.collective_timeout, self.max_nonfinite = device, collective_timeout, max_nonfinite
        self.step, self.nonfinite, self.metrics = 0, 0, {"val_loss": None}
        self.clock, self.stack = Stopwatch(), contextlib.ExitStack()

    def __enter__(self):
        self.stack.enter_context(handlers_restored())  # at last: a rank that waits for the others may be signalled
        ranks = distributed.distributed(self.requested_device, self.collective_timeout)
        self.rank, self.local_rank, self.world_size, self.device = self.stack.enter_context(ranks)
        self.device_name, self.peak_tflops = devices.name_and_peak(self.device)
        # a restart by torchrun --max-restarts resumes by itself, also on the machines whose own count is still 0
        restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device=self.device)
        self.restarted = distributed.sum_over_ranks(restarts).item() > 0
        if not self.resume and not self.restarted:
            self.folder.refuse_other_run()
        self.stack.callback(self.folder.close)
        self.check_stop = stop_on_signals(self.device)
        return self

    def __exit__(self, kind, error, trace):
        if error and not isinstance(error, StopRun):
            if self.world_size > 1:  # at once: leaving in order would wait for the ranks that wait for this one
                os._exit(report(error))
            return self.stack.__exit__(kind, error, trace)
        with self.stack:
            if error:
                self.save()
                self.metrics["signal"] = int(error.number)
                self.folder.check_saved()
                self.say(f"{error}. To resume, give the same command with --init_from resume")
            self.metrics["step"] = self.step
        return True

    def open_folder(self):
        """Hold log_dir for this run; return the newest checkpoint in it, None where there is none to resume from."""
        path = distributed.from_rank_0(self.folder.open(self.resume, self.restarted) if self.rank == 0 else None)
        return load_checkpoint(path, mmap=self.device.type == "cuda") if path else None

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
            self.say(f"no checkpoint in {self.folder.path}/ yet: starting at step 0, from scratch")
        if self.rank == 0:
            self.folder.begin(self.step, settings["train_config"])

    def save(self):
        """Save a checkpoint of the steps done; where that fails it is said, and the run goes on."""
        with self.clock.timing("checkpoints"):
            if self.rank == 0:
                contents = {name: part.state_dict() for name, part in self.stateful.items()}
                contents |= {**self.settings, "step": self.step, "nonfinite": self.nonfinite}
                contents |= {"val_loss": self.metrics["val_loss"], "random_states": [torch.get_rng_state()]}
                self.folder.save(contents)

    def checkpoint_bytes(self):
        return sum(t.nbytes for part in self.stateful.values() for t in tensors_of(part.state_dict()))

    def steps(self, max_steps, tokens, flops_per_token):
        """Count the steps from here to max_steps, inclusive: the last weights are evaluated and saved, too. `tokens` of
        a step and `flops_per_token` are for its speed on the console."""
        first, self.max_steps, self.cost = self.step, max_steps, (tokens, flops_per_token)
        for step in range(first, max_steps + 1):
            self.step = step
            self.check_stop()
            if self.nonfinite >= self.max_nonfinite:
                self.diverged()
            yield step
            if step == first:
                distributed.set_timeout(self.collective_timeout)
            elif step == first + 1 and (warning := short_shutdown(self.clock.last, self.checkpoint_bytes())):
                self.say(warning)

    def due(self, every):
        """Whether this step is one of every so many, or the last."""
        return every > 0 and (self.step % every == 0 or self.step == self.max_steps)

    def say(self, message):
        if self.rank == 0:
            say(message)

    def record(self, kind, value, more="", show=True, **numbers):
        """Record a metric of this step, "train", "val" or "hella", in log_dir and, with `show`, on the console."""
        self.metrics[METRICS[kind].name] = value
        if self.rank == 0:
            self.folder.record(self.step, kind, value, numbers)
        if show:
            steps = f"{self.step:5d}" + (f"/{self.max_steps}" if kind == "train" else "")
            self.say(f"step {steps} | {METRICS[kind].label} {value:{METRICS[kind].format}}{more}")

    def record_step(self, loss, norm, lr, finite, show=True):
        """Record an optimizer step, and count those in a row whose update was skipped, which are always shown."""
        self.nonfinite = 0 if finite else self.nonfinite + 1
        seconds, peak = self.clock.last, self.world_size * (self.peak_tflops or 0)
        numbers, text = rates(seconds, *self.cost, peak, self.max_steps - self.step - 1)
        more = f" | lr {lr:.4e} | norm {norm:.4f} | {text}" + ("" if finite else " | UPDATE SKIPPED, NOT FINITE")
        self.record("train", loss, more, show or not finite, lr=lr, norm=norm, **numbers)

    def diverged(self):
        """End the run, with the checkpoints of the skipped steps set aside, so that a resume begins before them."""
        first = self.step - self.nonfinite
        before = distributed.from_rank_0(checkpoints.set_aside(self.folder.path, first) if self.rank == 0 else None)
        raise UserError(
            f"not finite in {self.nonfinite} steps in a row up to step {self.step - 1}: try a lower max_lr or --dtype "
            f"float32, and --init_from resume, which continues from {before or 'step 0'}"
        )

    def finish(self, hint):
        """The last words of a run that came to its end; `hint` says what to do with its last CHECKPOINT."""
        self.folder.check_saved()
        self.say(f"done: {self.clock}")
        if self.folder.saved:
            checkpoint = shlex.quote(str(self.folder.saved))
            self.say(f"All is in {self.folder.path}/\nnext: {hint.replace('CHECKPOINT', checkpoint)}")
