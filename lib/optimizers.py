"""Several optimizers as one, and loading their state from a checkpoint that may be damaged, forged, or not theirs."""

import torch
from torch.optim import AdamW

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

    def state_dict(self):
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}


def as_one(optimizer, max_lr):
    """Combine an optimizer, or a list of several, into one, and store in each parameter group the ratio of its learning
    rate to max_lr, which the schedule preserves."""
    optimizer = Optimizers(*optimizer) if isinstance(optimizer, list | tuple) else optimizer
    for group in optimizer.param_groups:
        group["lr_scale"] = group["lr"] / max_lr if max_lr else 1.0
    return optimizer


def parts_of(optimizer):
    return optimizer.optimizers if isinstance(optimizer, Optimizers) else [optimizer]


def settings_of(optimizer):
    """The class and the settings of each parameter group as plain data, such as betas and weight_decay; not the
    learning rate, which every step sets."""
    return [
        {"class": type(part).__name__}
        | {name: value for name, value in group.items() if type(value) in PLAIN and name not in ("lr", "lr_scale")}
        for part in parts_of(optimizer)
        for group in part.param_groups
    ]


def make_moments(optimizer):
    """Allocate AdamW's moments now. Allocated in the first step, they fragment memory, and the rehearsal no longer
    predicts the peak."""
    for part in [part for part in parts_of(optimizer) if type(part) is AdamW]:
        for group in [group for group in part.param_groups if not group["amsgrad"]]:
            for p in [p for p in group["params"] if p.requires_grad and not part.state[p]]:
                step = torch.zeros((), device=p.device if group["fused"] or group["capturable"] else "cpu")
                part.state[p].update(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))


def state_like(optimizer):
    """Tensors as large as the state that the first step will allocate: two for each parameter, as in Adam."""
    groups = [group for part in parts_of(optimizer) if not part.state for group in part.param_groups]
    return [torch.empty_like(p) for group in groups for p in group["params"] * 2 if p.requires_grad]


def check_adamw(optimizer, state, trained):
    """Raise ValueError unless the state has the shapes of the parameters, beyond which the fused kernel would read, and
    moments for each of them, if it is `trained`."""
    parameters = [(p, group["amsgrad"]) for group in optimizer.param_groups for p in group["params"]]
    if unknown := [index for index in state["state"] if index not in range(len(parameters))]:
        raise ValueError(f"it has state of parameters {unknown}, of {len(parameters)}")
    for index, (p, amsgrad) in enumerate(parameters):
        shapes = {"step": (), "exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}
        shapes |= {"max_exp_avg_sq": tuple(p.shape)} if amsgrad else {}
        moments = state["state"].get(index)
        if moments is None:  # one that no loss has reached yet; without amsgrad, make_moments gives it moments, too
            if trained and p.requires_grad and not amsgrad:
                raise ValueError(f"it has no moments of parameter {index}")
        elif (found := {name: tuple(value.shape) for name, value in moments.items()}) != shapes:
            raise ValueError(f"for parameter {index} it has the shapes {found}, not {shapes}")


def load_optimizer(optimizer, state, trained, settings=None):
    """Load a state_dict into an optimizer; trained: whether it has made a step.

    settings: settings_of the optimizer that the run began with. Where this optimizer differs from them, the user has
    changed a setting since, and the new value is kept; without them, its own settings are kept. Raises UserError if the
    state is that of another optimizer.
    """
    try:
        if isinstance(optimizer, Optimizers):
            settings = iter(settings or [])
            for part, its_state in zip(optimizer.optimizers, state["optimizers"], strict=True):
                its_settings = [group for _, group in zip(part.param_groups, settings, strict=False)]
                load_optimizer(part, its_state, trained, its_settings)
            return
        if type(optimizer) is AdamW:  # a class derived from it may keep something else
            check_adamw(optimizer, state, trained)
        groups = []
        for i, (theirs, own) in enumerate(zip(state["param_groups"], optimizer.param_groups, strict=True)):
            began = settings[i] if settings else {}
            if began.get("class", type(optimizer).__name__) != type(optimizer).__name__:
                raise ValueError(f"it is of {began['class']}, not {type(optimizer).__name__}")
            evolved = {name: theirs[name] for name in began if name in theirs and own.get(name) == began[name]}
            groups.append({**own, **evolved, "lr": theirs["lr"], "params": theirs["params"]})
        optimizer.state.clear()  # its memory
        optimizer.load_state_dict({**state, "param_groups": groups})
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError) as error:
        raise UserError(
            f"cannot resume: the checkpoint's optimizer does not match this code's: {error}. To continue from its "
            "weights with another optimizer, start a new run: --init_from CHECKPOINT --log_dir ANOTHER_FOLDER"
        ) from None
