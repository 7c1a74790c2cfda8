"""
Optimizers: several as one, and the state of any from a checkpoint, which may be damaged, forged, or of another one.
"""

import copy

import torch

from lib.console import UserError

PLAIN = (bool, int, float, str, tuple, type(None))


class Optimizers:
    """Several optimizers, which a run steps, saves and resumes as if they were one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}


def settings_of(optimizer):
    """The settings of each parameter group as plain data, such as betas and weight_decay, but the learning rate, which
    every step sets."""
    return [
        {name: value for name, value in group.items() if isinstance(value, PLAIN) and name not in ("lr", "lr_scale")}
        for group in optimizer.param_groups
    ]


def shapes_of(state):
    """The shapes of the tensors that an optimizer keeps for one parameter, by name."""
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}


def expected_state(optimizer):
    """What this optimizer keeps for each of its parameters, as a list of dicts: a copy of it is made to take a step."""
    trial = object.__new__(type(optimizer))
    trial.__dict__ = copy.deepcopy(optimizer.__dict__)  # its parameters, too
    parameters = [p for group in trial.param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    trial.step()
    return [trial.state.get(parameter, {}) for parameter in parameters]


def load_optimizer(optimizer, state, trained, settings=None):
    """Load a state_dict into an optimizer; that of a `trained` model must hold something for every parameter.

    settings: settings_of the optimizer that the run began with. What this one has otherwise was changed since then and
    is kept; without them, all of this one's are. Raises UserError unless every tensor has the shape that this optimizer
    gives it: a fused kernel would read beyond it.
    """
    try:
        if isinstance(optimizer, Optimizers):
            parts = zip(optimizer.optimizers, state["optimizers"], strict=True)
            settings = iter(settings or [])
            for part, its_state in parts:
                its_settings = [group for _, group in zip(part.param_groups, settings, strict=False)]
                load_optimizer(part, its_state, trained, its_settings)
            return
        expected = [shapes_of(its_state) for its_state in expected_state(optimizer)]
        for index in [i for i, shapes in enumerate(expected) if shapes and (trained or state["state"])]:
            found = shapes_of(state["state"].get(index, {}))
            if found != expected[index]:
                raise ValueError(f"of parameter {index} it has the shapes {found}, not {expected[index]}")
        if unknown := [index for index in state["state"] if index not in range(len(expected))]:
            raise ValueError(f"it has state of parameters {unknown}, beyond the {len(expected)} of the model")
        groups = []
        for i, (theirs, own) in enumerate(zip(state["param_groups"], optimizer.param_groups, strict=True)):
            began = settings[i] if settings else {}
            evolved = {name: theirs[name] for name in began if name in theirs and own.get(name) == began[name]}
            groups.append({**own, **evolved, "lr": theirs["lr"], "params": theirs["params"]})
        optimizer.load_state_dict({**state, "param_groups": groups})
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(
            f"cannot resume: the checkpoint's optimizer is not the one of this code: {error}. To go on from its "
            "weights with another optimizer, start a new run: --init_from CHECKPOINT --log_dir ANOTHER_FOLDER"
        ) from None
