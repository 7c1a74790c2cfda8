"""
The knobs of a run: from the command line, within their ranges, and which of them a resumed run may change.
"""

import argparse
import inspect
import math
import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from lib.common import UserError

# from, to (both allowed) for each number
RANGES = {
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "vocab_size", "sequence_length"), (1, 2**31)),
    **dict.fromkeys(("total_batch_size", "micro_batch_size", "val_tokens"), (1, 2**40)),
    **dict.fromkeys(("max_steps", "warmup_steps"), (0, 2**63)),
    **dict.fromkeys(("log_every", "val_every", "hellaswag_every", "sample_every", "plot_every"), (0, 2**63)),
    "checkpoint_every": (0, 2**63),
    **dict.fromkeys(("max_lr", "weight_decay", "grad_clip"), (0, 1e30)),
    "min_lr_ratio": (0, 1),
    "sample_temperature": (0, 100),
    "plan_speed": (0, 2**63),
    "keep_checkpoints": (2, 2**31),
    "seed": (0, 2**32 - 1),
    "max_nonfinite": (1, 2**31),
    "collective_timeout": (1, 10**7),
}
CHOICES = {
    "device": ("auto", "cuda", "mps", "cpu"),
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "tracker": ("", "tensorboard", "wandb"),
}
FIXED = ("n_layer", "n_head", "n_embd", "vocab_size", "sequence_length", "total_batch_size", "seed")
CHANGEABLE = ("max_steps", "warmup_steps", "max_lr", "min_lr_ratio", "weight_decay", "grad_clip", "dtype")


def comments_of(dataclass):
    """The comment that stands beside each field in the source, by the field's name."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(dataclass), re.M))


def parse_args(dataclass, presets, description, argv=None):
    """The command line as a dataclass: its defaults, the preset's overrides, then the flags. Every field is a flag."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=presets, default="gpt2", help="a named set of overrides (default: gpt2)")
    comments = comments_of(dataclass)
    for field in fields(dataclass):
        kind = {"action": argparse.BooleanOptionalAction} if field.type in (bool, bool | None) else {"type": field.type}
        text = f"{comments.get(field.name, '')} (default: {field.default!r})".strip().replace("%", "%%")
        parser.add_argument(f"--{field.name}", help=text, **kind)
    flags = vars(parser.parse_args(argv))
    return dataclass(**{**presets[flags.pop("preset")], **flags})


def divisors(n):
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def conditions(c, world_size, model_names):
    """What must hold between knobs, each with the message for where it does not."""
    sequences, rest = divmod(c.total_batch_size, c.sequence_length * world_size)  # of each rank in a step
    fit = [] if rest else divisors(sequences)
    return [
        (
            c.n_embd % c.n_head == 0,
            f"n_embd {c.n_embd} is not divisible by n_head {c.n_head}: these n_head fit: {divisors(c.n_embd)}",
        ),
        (
            min(sequences, c.micro_batch_size) in fit,
            f"total_batch_size {c.total_batch_size} is not divisible by micro_batch_size {c.micro_batch_size} x "
            f"sequence_length {c.sequence_length} x {world_size} ranks: these micro-batch sizes fit: {fit or 'none'}",
        ),
        (
            c.init_from in ("scratch", "resume", *model_names) or Path(c.init_from).exists(),
            f"init_from {c.init_from!r} is no file and none of scratch, resume, {', '.join(model_names)}",
        ),
        (
            c.vocab_size >= 50257 or not (c.sample_every or c.hellaswag_every),
            f"vocab_size {c.vocab_size} is below 50257: it needs --sample_every 0 --hellaswag_every 0",
        ),
        (
            not c.tracker or find_spec(c.tracker),
            f"tracker is {c.tracker!r}, which is not installed: pip install {c.tracker}, or give no --tracker",
        ),
        (
            c.sample_prompt or not c.sample_every,
            "sample_prompt is empty: give the samples a beginning, or --sample_every 0",
        ),
    ]


def check(c, world_size, model_names):
    """Raise UserError, with the remedy, for knobs that cannot run."""
    for name, (least, most) in RANGES.items():
        if not least <= getattr(c, name) <= most:  # so that NaN is refused, too
            limit = f"{least} or more" if getattr(c, name) < least else f"from {least} to {most}"
            raise UserError(f"{name} is {getattr(c, name)}: it must be {limit}")
    for name, choices in CHOICES.items():
        if getattr(c, name) not in choices:
            names = " ".join(choice or "empty" for choice in choices)
            raise UserError(f"{name} is {getattr(c, name)!r}: it must be one of {names}")
    for holds, message in conditions(c, world_size, model_names):
        if not holds:
            raise UserError(message)


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
