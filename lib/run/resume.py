"""
From a checkpoint back to a run, or to a message that says what does not fit.
"""

import torch

from lib.console import UserError

# knobs that a resumed run keeps, and those that it may change and says so
FIXED = ("n_layer", "n_head", "n_embd", "vocab_size", "sequence_length", "total_batch_size", "seed")
CHANGEABLE = ("max_steps", "warmup_steps", "max_lr", "min_lr_ratio", "weight_decay", "grad_clip", "dtype")


def load_optimizer(optimizer, state, trained):
    """Load moments, which a `trained` model must have, into an optimizer that keeps its own settings but for the rate,
    which each step sets. Raises UserError where their shapes differ: the fused kernel would read beyond them."""
    own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    try:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if (trained or state["state"]) and len(state["state"]) != len(parameters):
            raise ValueError(f"it has moments of {len(state['state'])} parameters, not of {len(parameters)}")
        for index, moments in state["state"].items():
            shape = tuple(parameters[index].shape)
            expected = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
            found = {name: tuple(value.shape) for name, value in moments.items()}
            if found != expected:
                raise ValueError(f"parameter {index} has moments of the shapes {found}, not {expected}")
        # with its own settings: where a moment's step lies depends on them
        groups = [{**group, **settings} for group, settings in zip(state["param_groups"], own, strict=True)]
        optimizer.load_state_dict({**state, "param_groups": groups})
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"cannot resume: the optimizer's state does not fit this model: {error!r}") from None


def tensors_of(state):
    """The tensors in a state_dict, at any depth."""
    if isinstance(state, torch.Tensor):
        yield state
    for value in state.values() if isinstance(state, dict) else ():
        yield from tensors_of(value)


def restore(checkpoint, stateful):
    """Load the states of a checkpoint into what has them, by name, and torch's random state."""
    try:
        name = "random_states"
        torch.set_rng_state(checkpoint[name][0])
        for name, part in stateful.items():
            if isinstance(part, torch.optim.Optimizer):
                # no moments yet: where all steps were skipped, which float16's scaler may do by itself
                trained = checkpoint["step"] > checkpoint.get("nonfinite", 0) and not checkpoint.get("scaler")
                load_optimizer(part, checkpoint[name], trained)
            elif checkpoint.get(name):  # a run in float32 leaves an empty state of its gradient scaler
                part.load_state_dict(checkpoint[name])
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"cannot resume: the checkpoint's {name} is missing or of another kind: {error!r}") from None


def compare_runs(before, now, step):
    """Raise UserError where the knobs or the data of two runs (dicts with train_config and data) differ such that the
    first could not be continued exactly at `step`. Returns what else was changed, as text."""
    if not isinstance(before.get("data"), dict) or step < 0:
        raise UserError(f"cannot resume: the checkpoint's data ({before.get('data')}) or step ({step}) are no run's")
    old, new = before["train_config"], now["train_config"]
    for name in FIXED:
        if old.get(name) != new[name]:
            raise UserError(
                f"cannot resume: {name} was {old.get(name)} when the run began, it is {new[name]} now: give --{name} "
                f"{old.get(name)}, or start a new run in another --log_dir"
            )
    if before["config"]["block_size"] < new["sequence_length"]:
        raise UserError(
            f"cannot resume: the checkpoint's model {before['config']} is for shorter sequences: start a new run in "
            "another --log_dir"
        )
    for name in sorted({*before["data"], *now["data"]}):
        was, found = before["data"].get(name, ["none"]), now["data"].get(name, ["none"])
        both = [pair for pair in zip(was, found, strict=False) if None not in pair]  # a sha256 takes a manifest
        if len(was) != len(found) or any(a != b for a, b in both):
            raise UserError(
                f"cannot resume: {name} is not the shard that the run began with (tokens, sha256, fingerprint: {was}, "
                f"now {found}): put the old one back, or start a new run in another --log_dir"
            )
    if new["max_steps"] < step:
        raise UserError(f"cannot resume: the run is at step {step}, beyond max_steps {new['max_steps']}")
    changed = [f"{name} {old[name]} -> {new[name]}" for name in CHANGEABLE if name in old and old[name] != new[name]]
    changed += [f"{name} is new" for name in new if name not in old]
    changed += [f"{name} is gone" for name in old if name not in new]
    return "".join(f", {change}" for change in changed)
