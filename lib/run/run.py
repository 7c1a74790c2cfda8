"""
What the training loop needs besides the lesson: steps, records, checkpoints, signals, and how a run ends.
"""

import shlex
import signal

from lib.console import Interrupted, Stopped, UserError, print0
from lib.distributed import from_rank_0, is_main_rank, set_timeout
from lib.optimizers import settings_of
from lib.run import checkpoints, summary
from lib.run.folder import code_version
from lib.run.log import METRICS, Stopwatch
from lib.run.resume import compare_runs, random_states, restore
from lib.run.signals import catch_signals


class Run:
    """A run, from its checkpoint on, or from step 0 without one.

    state: objects with a state_dict, by name, which a resume restores. facts: plain data that identify the run: config,
    train_config, data. Both are saved in every checkpoint. max_nonfinite: the run ends after this many steps in a row
    without a finite loss and gradient. timeout: seconds to wait for a dead or hung rank after the first step.

    step: optimizer steps done; metrics: the latest of each.
    """

    def __init__(self, folder, state, facts, checkpoint, max_steps, max_nonfinite, timeout):
        self.folder, self.state, self.max_steps = folder, state, max_steps
        self.max_nonfinite, self.timeout = max_nonfinite, timeout
        self.facts = {**facts, "commit": code_version(), "optimizer_settings": settings_of(state["optimizer"])}
        self.step, self.nonfinite, self.metrics = 0, 0, {"val_loss": None}
        self.clock, self.timed_from = Stopwatch(), 0
        if checkpoint:
            changes = compare_runs(checkpoint, self.facts)
            self.step, self.nonfinite = checkpoint["step"], checkpoint.get("nonfinite", 0)
            self.metrics["val_loss"] = checkpoint.get("val_loss")
            self.clock.update(checkpoint.get("seconds", {}))
            self.timed_from = 0 if "seconds" in checkpoint else self.step
            restore(checkpoint, state)
            print0(f"resuming at step {self.step}{changes}")
        elif folder.resume:
            print0(
                f"no checkpoint in {folder.path}/ yet: starting at step 0, from {facts['train_config']['init_from']}"
            )
        if is_main_rank():
            folder.begin(self.step, facts["train_config"])
        self.caught = catch_signals()

    def steps(self):
        """Yield the steps from here to max_steps, inclusive: the last weights are evaluated and saved, too."""
        first = self.step
        for step in range(first, self.max_steps + 1):
            self.step = step
            self.check_stop()
            yield step
            if step == first:
                set_timeout(self.timeout)

    def due(self, every):
        """Whether something done every so many steps is due at this one; at the last step, everything is."""
        return every > 0 and (self.step % every == 0 or self.step == self.max_steps)

    def say(self, *messages):
        """Print lines on rank 0, with the step in front."""
        for message in messages:
            print0(f"step {self.step:5d} | {message}")

    def show_samples(self, texts):
        """Print texts that the model wrote, and add them to samples.txt."""
        self.say(*[f"sample {text!r}" for text in texts])
        for text in texts:
            self.folder.samples.record(self.step, {"sample": repr(text)})

    def record(self, **values):
        """Record numbers of this step, by kind, in log.txt and with the tracker."""
        self.metrics |= {METRICS.get(kind, kind): value for kind, value in values.items()}
        if is_main_rank():
            self.folder.record(self.step, values)

    def save(self):
        """Save a checkpoint; if that fails, warn and go on."""
        with self.clock.timing("checkpoints"):
            if is_main_rank():
                contents = {name: part.state_dict() for name, part in self.state.items()}
                contents |= {**self.facts, "step": self.step, "nonfinite": self.nonfinite}
                contents |= {"val_loss": self.metrics["val_loss"], "random_states": random_states()}
                contents |= {"seconds": dict(self.clock)}
                self.folder.save(contents)

    def check_stop(self):
        """Save and raise Stopped, on all ranks together, if any of them received a signal to stop."""
        if number := self.caught():
            self.save()
            self.folder.check_saved()
            print0("stopped by a signal. To resume, give the same command with --init_from resume")
            raise Interrupted(number) if number == signal.SIGINT else Stopped(number)

    def count_finite(self, finite):
        """Count the consecutive steps whose update was skipped. After max_nonfinite of them, end the run and set the
        checkpoints of these steps aside, so that a resume starts before them."""
        self.nonfinite = 0 if finite else self.nonfinite + 1
        if self.nonfinite < self.max_nonfinite:
            return
        first = self.step + 1 - self.nonfinite
        before = from_rank_0(checkpoints.set_aside(self.folder.path, first) if is_main_rank() else None)
        raise UserError(
            f"loss or gradient was NaN or infinite in steps {first}-{self.step}: try a lower max_lr or --dtype "
            f"float32, and --init_from resume, which continues from {before or 'step 0'}"
        )

    def finish(self, config, devices, scored):
        """Print the results of a finished run, write them to log_dir/summary.md, and suggest what to do next. Returns
        the last metrics."""
        self.folder.check_saved()
        self.metrics["step"] = self.step
        print0(f"done: {self.clock}")
        if is_main_rank():
            parameters = sum(p.numel() for p in self.state["model"].parameters())
            rows = summary.results(self.step, self.metrics, self.clock, config, parameters, self.timed_from)
            self.folder.summarize(f"GPT-2 on {devices}", rows, config, self.facts)
        if self.folder.saved:
            checkpoint, prompt = shlex.quote(str(self.folder.saved)), shlex.quote(config.sample_prompt)
            score = f"; python hellaswag.py -m {checkpoint}" if scored else ""
            print0(f"next: python -m tools.sample {checkpoint} --prompt={prompt}{score}")
        return self.metrics
