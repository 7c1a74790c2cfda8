"""TensorBoard or wandb, which cannot stop the run that they follow."""

import os
import secrets

from lib.console import say


class Tracker:
    """kind: "tensorboard", "wandb" or "" for none. Begins or continues the curves of log_dir at a step. An error of the
    package is reported once, and ends the tracking."""

    def __init__(self, kind, log_dir, step, settings):
        self.kind = kind
        self.log = self.end = None
        if kind:
            opened = self.attempt({"tensorboard": open_tensorboard, "wandb": open_wandb}[kind], log_dir, step, settings)
            self.log, self.end = opened or (None, None)

    def attempt(self, action, *args):
        try:
            return action(*args)
        except Exception as error:  # from any package involved
            say(f"warning: {self.kind} has failed, log.txt has every number: {type(error).__name__}: {error}")
            self.log = self.end = None

    def send(self, step, numbers):
        if self.log:
            self.attempt(self.log, step, numbers)

    def close(self):
        if self.end:
            self.attempt(self.end)


def open_tensorboard(log_dir, step, settings):
    from torch.utils.tensorboard import SummaryWriter

    # what a killed run wrote from this step on is hidden
    path = log_dir / "tensorboard" / log_dir.absolute().name  # TensorBoard names a run after its folder
    writer = SummaryWriter(path, purge_step=step, flush_secs=10)
    writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()), step)

    def log(step, numbers):
        for name, value in numbers.items():
            group = "loss" if name.endswith("loss") else "other"  # groups are shown in the order of the alphabet
            writer.add_scalar(f"{group}/{name}", value, step)

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
