"""
The settings of a run: from the command line or from Python, as plain values within their ranges.
"""

import argparse
import ast
import functools
import inspect
import json
import math
import os
import re
import types
import typing
from dataclasses import fields, replace
from importlib.util import find_spec
from numbers import Integral, Real
from os import PathLike
from pathlib import Path

from lib.console import UserError
from lib.files import expand, why_missing
from lib.tokenizer import VOCAB_SIZE

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
    "keep_checkpoints": (2, 2**31),
    "seed": (0, 2**32 - 1),
    "max_nonfinite": (1, 2**31),
    "collective_timeout": (1, 10**7),
}
# what a field of a type takes
KINDS = {int: Integral, float: Real, str: (str, PathLike)}
PATHS = ("data_dir", "data_source", "log_dir", "init_from")
CHOICES = {
    "device": ("auto", "cuda", "mps", "cpu"),
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "tracker": ("", "tensorboard", "wandb"),
}
TRUTH = {True: ("true", "yes", "on", "1"), False: ("false", "no", "off", "0")}


def comments_of(dataclass):
    """The comment that stands beside each field in the source, by the field's name."""
    source = "".join(inspect.getsource(kind) for kind in reversed(dataclass.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))


def options(kind):
    """The types that a field's annotation allows: float and None for float | None."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def elements(kind, count):
    """The types of `count` elements of a tuple or list."""
    args = typing.get_args(kind) or (str,)
    return args[:1] * count if args[1:] in ((), (...,)) else args


def parse(text, kind):
    """The value of a flag, of the type of its field: "none" for None, "0.9,0.95" for a tuple, true or false for a bool.
    A field of another type takes what one would write in Python."""
    for option in options(kind):
        origin = typing.get_origin(option) or option
        try:
            if option is types.NoneType:
                if text.lower() in ("none", "auto"):
                    return None
            elif option is bool:
                return next(value for value, words in TRUTH.items() if text.lower() in words)
            elif origin is typing.Literal:
                return next(value for value in typing.get_args(option) if text == str(value))
            elif origin in (tuple, list):
                words = text.split(",") if text else []
                return origin(parse(*pair) for pair in zip(words, elements(option, len(words)), strict=True))
            else:
                return option(text) if option in (int, float, str) else ast.literal_eval(text)
        except (ValueError, SyntaxError, StopIteration, argparse.ArgumentTypeError):
            continue
    no = "; or give the flag alone, or begin it with --no-" if bool in options(kind) else ""
    raise argparse.ArgumentTypeError(f"{text!r} is not {name_of(kind)}{no}")


def name_of(kind):
    return "true or false" if kind in (bool, bool | None) else getattr(kind, "__name__", str(kind))


def parse_args(dataclass, presets, description, argv=None):
    """The command line as a dataclass: its defaults, the preset's overrides, then the flags. Every field is a flag."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=presets, default="gpt2", help="a named set of overrides (default: gpt2)")
    comments, kinds = comments_of(dataclass), typing.get_type_hints(dataclass)
    for field in fields(dataclass):
        text = f"{comments.get(field.name, '')} (default: {field.default!r})".strip().replace("%", "%%")
        flag = {"type": functools.partial(parse, kind=kinds[field.name]), "help": text}
        if bool in options(kinds[field.name]):
            parser.add_argument(f"--no-{field.name}", dest=field.name, action="store_false", help="switches it off")
            flag |= {"nargs": "?", "const": True, "metavar": "BOOL"}
        parser.add_argument(f"--{field.name}", **flag)
    flags = vars(parser.parse_args(argv))
    preset = presets[flags.pop("preset")]
    if "data_source" in preset and is_own_data(flags.get("data_dir"), preset["data_source"]):
        preset = {name: value for name, value in preset.items() if name not in ("data_source", "sample_prompt")}
    return dataclass(**{**preset, **flags})


def is_own_data(folder, source):
    """Whether there are shards in a folder, and of another source."""
    names = os.listdir(folder) if folder and os.path.isdir(folder) else []
    try:
        return json.loads(Path(folder, "manifest.json").read_bytes())["source"] != source
    except (OSError, TypeError, ValueError, KeyError):
        return any(name.endswith((".npy", ".bin")) for name in names)


def divisors(n):
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def batch_near(c, world_size):
    """Flags for a batch near the requested one that divides evenly among the ranks."""
    unit = c.sequence_length * world_size
    micro_batches = math.ceil(c.total_batch_size / unit / c.micro_batch_size)  # of a rank in a step
    size = max(1, round(c.total_batch_size / unit / micro_batches))
    flags = f"--total_batch_size {size * micro_batches * unit}"
    if micro_batches == 1 or size == c.micro_batch_size:
        return flags
    unit *= c.micro_batch_size
    same = max(1, round(c.total_batch_size / unit)) * unit
    return f"{flags} --micro_batch_size {size}, or --total_batch_size {same},"


def conditions(c, world_size, model_names):
    """Pairs of a condition that must hold and the message if it does not."""
    sequences, rest = divmod(c.total_batch_size, c.sequence_length * world_size)  # of each rank in a step
    fit, near = ([], f"none; {batch_near(c, world_size)} would do") if rest else (divisors(sequences), "")
    names = ("scratch", "resume", *model_names)
    missing = "" if c.init_from in names else why_missing(c.init_from)
    return [
        (
            c.n_embd % c.n_head == 0,
            f"n_embd {c.n_embd} is not divisible by n_head {c.n_head}: these n_head fit: {divisors(c.n_embd)}",
        ),
        (
            min(sequences, c.micro_batch_size) in fit,
            f"total_batch_size {c.total_batch_size} is not divisible by micro_batch_size {c.micro_batch_size} x "
            f"sequence_length {c.sequence_length} x {world_size} ranks: these micro-batch sizes fit: {fit or near}",
        ),
        (
            not missing,
            f"init_from {c.init_from!r} is not a file and none of {', '.join(names)}: {missing}",
        ),
        (
            c.vocab_size >= VOCAB_SIZE or not (c.sample_every or c.hellaswag_every),
            f"vocab_size {c.vocab_size} is below {VOCAB_SIZE}: it needs --sample_every 0 --hellaswag_every 0",
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


def plain_value(value, kind):
    """A value as plain data of a field's type; a sweep may give numbers of numpy, or paths. Raises TypeError."""
    for option in options(kind):
        origin = typing.get_origin(option) or option
        if origin is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif origin in (tuple, list):
            if isinstance(value, tuple | list):
                kinds = elements(option, len(value)) if typing.get_args(option) else map(type, value)
                return origin(plain_value(*pair) for pair in zip(value, kinds, strict=True))
        elif isinstance(value, KINDS.get(option, origin)):
            return option(value) if option in (int, float, str) else value
    raise TypeError


def plain(c):
    """The settings c as plain data: checkpoints hold nothing else."""
    values, kinds = {}, typing.get_type_hints(type(c))
    for field in fields(c):
        value, kind = getattr(c, field.name), kinds[field.name]
        try:
            is_default = value is None and field.default is None  # as in "size: int = None"
            values[field.name] = None if is_default else plain_value(value, kind)
        except (TypeError, ValueError):
            raise UserError(
                f"{field.name} is {value!r}: it must be of type {getattr(kind, '__name__', kind)}"
            ) from None
        if field.name in PATHS:
            values[field.name] = expand(values[field.name])
    return replace(c, **values)


def check(c, world_size, model_names):
    """Return the settings as plain values. Raises UserError, with the remedy, for those that cannot run."""
    c = plain(c)
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
    return c
