"""Restore a run from a checkpoint, or raise an error that says what does not match."""

import torch

from lib.console import UserError, print0
from lib.optimizers import Optimizers, load_optimizer
from lib.run.code import short

FIXED = ("sequence_length", "total_batch_size", "seed")  # besides those of the model
# settings of paths and output, whose changes are not reported
QUIET = (
    "data_dir", "data_source", "log_dir", "init_from", "log_every", "sample_every", "sample_prompt",
    "sample_temperature", "plot_every", "tracker", "checkpoint_every", "keep_checkpoints",
)  # fmt: skip


def restore(checkpoint, parts):
    """Load a checkpoint's states into the objects in `parts`, by name."""
    for name, part in parts.items():
        try:
            if name not in checkpoint:
                print0(f"{name} is not in the checkpoint: it begins anew")
            elif isinstance(part, torch.optim.Optimizer | Optimizers):
                # no moments yet if all steps were skipped, as float16's scaler may do
                trained = checkpoint["step"] > checkpoint.get("nonfinite", 0) and not checkpoint.get("scaler")
                load_optimizer(part, checkpoint[name], trained, checkpoint.get("optimizer_settings"))
            elif not isinstance(checkpoint[name], dict) or checkpoint[name]:  # that of a scaler is empty in float32
                part.load_state_dict(checkpoint[name])
        except UserError:
            raise
        except Exception as error:  # of whatever class the object is
            raise UserError(f"cannot resume: the checkpoint's {name} does not fit: {error!r}") from error


def compare_runs(before, now):
    """Raise UserError if the settings or the data of two runs (the contents of their checkpoints) differ such that the
    first could not be continued exactly. Returns the other changes as text."""
    old, new = before["train_config"], now["train_config"]
    for name in [name for name in new if name in FIXED or name in now["config"]]:
        default = old.get(name, now["config"].get(name))  # of a field that the model did not have yet
        was = before["config"].get(name, default)
        if was != new[name]:
            raise UserError(
                f"cannot resume: {name} was {was} when the run began and is {new[name]} now: give --{name} {was}, or "
                "start a new run in another --log_dir"
            )
    step, data, length = before["step"], before.get("data"), before["config"]["block_size"]
    if step < 0 or not isinstance(data, dict) or length < new["sequence_length"]:
        raise UserError(f"cannot resume: the checkpoint has an invalid step ({step}), block_size ({length}) or data")
    for name in sorted({*data, *now["data"]}):
        was, found = data.get(name, ["none"]), now["data"].get(name, ["none"])
        both = [pair for pair in zip(was, found, strict=False) if None not in pair]  # None: no manifest, no sha256
        if len(was) != len(found) or any(a != b for a, b in both):
            raise UserError(
                f"cannot resume: {name} is not the shard that the run began with (tokens, sha256, fingerprint: {was}, "
                f"now {found}): restore the old one, or start a new run in another --log_dir"
            )
    if new["max_steps"] < step:
        raise UserError(f"cannot resume: the run is at step {step}, beyond max_steps {new['max_steps']}")
    return "".join(f", {change}" for change in changes(before, now))


def changes(before, now):
    """Yield the differences between two runs in settings and code, except for paths and output."""
    old, new = before["train_config"], now["train_config"]
    for name in [name for name in new if name not in QUIET]:
        if name not in old:
            yield f"{name} is new"
        elif old[name] != new[name]:
            yield f"{name} {old[name]} -> {new[name]}"
    yield from (f"{name} is gone" for name in old if name not in new)
    groups = zip(before.get("optimizer_settings", []), now["optimizer_settings"], strict=False)
    for number, (was, found) in enumerate(groups):
        for name in [name for name in found if name in was and was[name] != found[name] and name not in new]:
            yield f"{name} of parameter group {number} {was[name]} -> {found[name]}"
    if before.get("script", now["script"])[0] != now["script"][0]:
        yield f"script {before['script'][0]} -> {now['script'][0]}"
    if before.get("commit") != now["commit"]:
        yield f"code {short(before.get('commit'))} -> {short(now['commit'])}"
