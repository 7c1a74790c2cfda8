"""
Several optimizers as one, and loading their state from a checkpoint that may be damaged, forged, or not theirs.
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


def as_one(optimizer, max_lr):
    """Combine an optimizer, or a list of several, into one, and store in each parameter group the ratio of its learning
    rate to max_lr, which the schedule preserves."""
    optimizer = Optimizers(*optimizer) if isinstance(optimizer, list | tuple) else optimizer
    for group in optimizer.param_groups:
        group["lr_scale"] = group["lr"] / max_lr if max_lr else 1.0
    return optimizer


def settings_of(optimizer):
    """The settings of each parameter group as plain data, such as betas and weight_decay; not the learning rate, which
    every step sets."""
    return [
        {name: value for name, value in group.items() if isinstance(value, PLAIN) and name not in ("lr", "lr_scale")}
        for group in optimizer.param_groups
    ]


def shapes_of(state):
    """The shapes of the tensors that an optimizer keeps for one parameter, by name."""
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}


def parts_of(optimizer):
    return optimizer.optimizers if isinstance(optimizer, Optimizers) else [optimizer]


def make_moments(optimizer):
    """Allocate AdamW's moments now. Its first step would place them in the gaps between that step's gradients, and the
    next step's gradients would not find the memory that the rehearsal found. Other optimizers allocate in a step."""
    for part in parts_of(optimizer):
        groups = part.param_groups if type(part) is torch.optim.AdamW else []
        for group in [] if any(group["amsgrad"] for group in groups) else groups:
            for p in [p for p in group["params"] if not part.state[p]]:
                step = torch.zeros((), device=p.device if group["fused"] or group["capturable"] else "cpu")
                part.state[p].update(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))


def expected_state(optimizer):
    """The state that this optimizer keeps for each of its parameters, as dicts, found by stepping a copy of it."""
    make_moments(optimizer)
    trial = optimizer
    if not optimizer.state:
        trial = object.__new__(type(optimizer))
        trial.__dict__ = copy.deepcopy(optimizer.__dict__)  # its parameters, too
        for parameter in [p for group in trial.param_groups for p in group["params"] if p.requires_grad]:
            parameter.grad = torch.zeros_like(parameter)
        trial.step()
    return [trial.state.get(p, {}) for group in trial.param_groups for p in group["params"]]


def missing_state(optimizer):
    """Tensors like those that the first step will allocate, to check that they fit in memory."""
    return [
        torch.empty_like(value)
        for part in parts_of(optimizer)
        if not part.state
        for state in expected_state(part)
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


def load_optimizer(optimizer, state, trained, settings=None):
    """Load a state_dict into an optimizer; if the model is `trained`, it must have state for every parameter.

    settings: settings_of the optimizer that the run began with. Where this optimizer differs from them, the user has
    changed a setting since, and the new value is kept; without them, all of its own are. Raises UserError unless every
    tensor has the shape that this optimizer gives it: a fused kernel would read out of bounds.
    """
    try:
        if isinstance(optimizer, Optimizers):
            settings = iter(settings or [])
            for part, its_state in zip(optimizer.optimizers, state["optimizers"], strict=True):
                its_settings = [group for _, group in zip(part.param_groups, settings, strict=False)]
                load_optimizer(part, its_state, trained, its_settings)
            return
        expected = [shapes_of(its_state) for its_state in expected_state(optimizer)]
        for index in [i for i, shapes in enumerate(expected) if shapes and (trained or state["state"])]:
            found = shapes_of(state["state"].get(index, {}))
            if found != expected[index]:
                raise ValueError(f"for parameter {index} it has the shapes {found}, not {expected[index]}")
        if unknown := [index for index in state["state"] if index not in range(len(expected))]:
            raise ValueError(f"it has state of parameters {unknown}, beyond the {len(expected)} of the model")
        groups = []
        for i, (theirs, own) in enumerate(zip(state["param_groups"], optimizer.param_groups, strict=True)):
            began = settings[i] if settings else {}
            evolved = {name: theirs[name] for name in began if name in theirs and own.get(name) == began[name]}
            groups.append({**own, **evolved, "lr": theirs["lr"], "params": theirs["params"]})
        optimizer.state.clear()  # its memory
        optimizer.load_state_dict({**state, "param_groups": groups})
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(
            f"cannot resume: the checkpoint's optimizer does not match this code's: {error}. To continue from its "
            "weights with another optimizer, start a new run: --init_from CHECKPOINT --log_dir ANOTHER_FOLDER"
        ) from None
