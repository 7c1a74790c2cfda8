"""
From a checkpoint back to a run, or to a message that says what does not fit.
"""

from dataclasses import fields

import torch

from lib.common import InputError


def rebuild(checkpoint, model_class, config_class):
    """The model of a checkpoint, on the CPU. Raises InputError where its weights are not those of its config, or the
    config is not one of this code."""
    config, weights = checkpoint["config"], checkpoint["model"]
    names = sorted(field.name for field in fields(config_class))
    if sorted(config) != names or not all(isinstance(value, int) and value > 0 for value in config.values()):
        raise InputError(f"the checkpoint's model has the config {config}: this code needs whole numbers for {names}")
    found = {name: tuple(getattr(weight, "shape", ())) for name, weight in weights.items()}
    expected = {}
    if config["n_layer"] <= len(weights) and config["n_embd"] % config["n_head"] == 0:
        with torch.device("meta"):  # shapes alone: a wrong config can ask for any amount of memory
            expected = {name: tuple(p.shape) for name, p in model_class(config_class(**config)).state_dict().items()}
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            raise InputError(
                f"the checkpoint's model does not fit its config {config}: {name} has the shape {found.get(name)}, "
                f"not {expected.get(name)}"
            )
    model = model_class(config_class(**config))
    model.load_state_dict(weights)
    return model


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


def tensors_of(state):
    """The tensors in a state_dict, at any depth."""
    if isinstance(state, torch.Tensor):
        yield state
    for value in state.values() if isinstance(state, dict) else ():
        yield from tensors_of(value)


def restore(checkpoint, stateful):
    """Load the states of a checkpoint into what has them, by name, and torch's random state."""
    for name, part in stateful.items():
        if isinstance(part, torch.optim.Optimizer):
            load_optimizer(part, checkpoint[name])
        elif checkpoint.get(name):  # a run in float32 leaves an empty state of its gradient scaler
            part.load_state_dict(checkpoint[name])
    torch.set_rng_state(checkpoint["random_states"][0])
