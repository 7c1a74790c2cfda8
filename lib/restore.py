"""
From a checkpoint back to a run, or to a message that says what does not fit.
"""

import torch

from lib.common import InputError


def load_optimizer(optimizer, state):
    """Load the moments of a checkpoint into an optimizer that keeps its own settings but for the rate, which each step
    sets. Raises InputError where they are of other shapes: the fused kernel would read beyond them."""
    own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    try:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, moments in state["state"].items():
            for name, value in moments.items():
                if value.dim() and value.shape != parameters[index].shape:
                    shapes = f"{tuple(value.shape)}, not {tuple(parameters[index].shape)}"
                    raise ValueError(f"{name} of parameter {index} has the shape {shapes}")
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise InputError(f"cannot resume: the optimizer's state does not fit this model: {error}") from None
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def restore(checkpoint, stateful):
    """Load the states of a checkpoint into what has them, by name, and torch's random state."""
    for name, part in stateful.items():
        if isinstance(part, torch.optim.Optimizer):
            load_optimizer(part, checkpoint[name])
        elif checkpoint.get(name):  # a run in float32 leaves an empty state of its gradient scaler
            part.load_state_dict(checkpoint[name])
    torch.set_rng_state(checkpoint["random_states"][0])
