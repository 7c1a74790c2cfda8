"""The settings of a run: from the command line or from Python, as plain values within their ranges."""

import argparse
import ast
import difflib
import functools
import inspect
import re
import sys
import types
import typing
from dataclasses import fields, replace
from importlib.util import find_spec
from numbers import Integral, Real
from os import PathLike

from lib.console import UserError
from lib.files import expand, why_missing
from lib.tokenizer import VOCAB_SIZE

# the inclusive range of each number; other settings may have any value
RANGES = {
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "vocab_size", "sequence_length", "max_nonfinite"), (1, 2**31)),
    **dict.fromkeys(("total_batch_size", "micro_batch_size", "val_tokens"), (1, 2**40)),
    **dict.fromkeys(("max_steps", "warmup_steps", "checkpoint_every"), (0, 2**63)),
    **dict.fromkeys(("log_every", "val_every", "hellaswag_every", "sample_every", "plot_every"), (0, 2**63)),
    **dict.fromkeys(("max_lr", "weight_decay", "grad_clip"), (0, 1e30)),
    "min_lr_ratio": (0, 1),
    "sample_temperature": (0, 100),
    "keep_checkpoints": (2, 2**31),
    "seed": (0, 2**32 - 1),
    "collective_timeout": (1, 10**7),
}
NUMBERS = {int: Integral, float: Real, str: (str, PathLike)}  # what a setting of a type accepts: numpy's numbers, too
PATHS = ("data_dir", "data_source", "log_dir", "init_from")
CHOICES = {
    "device": ("auto", "cuda", "mps", "cpu"),
    "dtype": ("auto", "bfloat16", "float16", "float32"),
    "tracker": ("", "tensorboard", "wandb"),
}
WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}

# -----------------------------------------------------------------------------
# Types


def options(kind):
    """The types that a field's annotation allows: float and None for float | None."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def name_of(kind):
    return "true or false" if kind in (bool, bool | None) else getattr(kind, "__name__", str(kind))


def plain_value(value, kind):
    """A value as plain data of a field's type; a sweep may give numbers of numpy, or paths. Raises TypeError."""
    for option in options(kind):
        origin = typing.get_origin(option) or option
        if origin is typing.Literal:
            if value in typing.get_args(option):
                return value
        elif origin is typing.Any or isinstance(value, NUMBERS.get(origin, origin)):
            return origin(value) if origin in NUMBERS else value
    raise TypeError(f"it must be {name_of(kind)}")


def plain(c):
    """A dataclass of settings as plain data of its annotated types: checkpoints hold nothing else."""
    values, kinds = {}, typing.get_type_hints(type(c))
    for field in [field for field in fields(c) if field.init]:
        value = getattr(c, field.name)
        try:
            is_default = value is None and field.default is None  # as in "size: int = None"
            values[field.name] = None if is_default else plain_value(value, kinds[field.name])
        except TypeError as error:
            raise UserError(f"{field.name} is {value!r}: {error}") from None
        if field.name in PATHS:
            values[field.name] = expand(values[field.name])
    return replace(c, **values)


def changed(c):
    """The settings that are not the defaults, as Python."""
    values = {field.name: getattr(c, field.name) for field in fields(c) if getattr(c, field.name) != field.default}
    return [f"{name} = {value!r}" for name, value in values.items()]


# -----------------------------------------------------------------------------
# The command line


def parse(text, kind):
    """The value of a flag by the type of its field: a number, a word, true or false, "none" for None. Any other type
    accepts what one would write in Python, such as 0.9,0.95 for a tuple."""
    for option in options(kind):
        try:
            if option is types.NoneType:
                if text.lower() in ("none", "auto"):
                    return None
            elif option is bool:
                return WORDS[text.lower()]
            elif option in (int, float, str):
                return option(text)
            else:
                value = text if typing.get_origin(option) is typing.Literal else ast.literal_eval(text)
                return plain_value(value, option)
        except (ValueError, SyntaxError, KeyError, TypeError):
            continue
    no = "; or give the flag alone, or begin it with --no-" if bool in options(kind) else ""
    raise argparse.ArgumentTypeError(f"{text!r} is not {name_of(kind)}{no}")


def comments_of(dataclass):
    """The comment that stands beside each field in the source, by the field's name."""
    try:
        source = "".join(inspect.getsource(kind) for kind in reversed(dataclass.__mro__[:-1]))
    except (OSError, TypeError):  # python -m cProfile and the like borrow the main module
        return {}
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))


def with_underscores(word):
    """A word of the command line, a flag with underscores in place of dashes."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """Say in a line what is wrong, with the flag that may have been meant."""
        unknown = re.match(r"unrecognized arguments: (--\w+)", message)
        if unknown and unknown[1] == "--local_rank":
            message = "--local-rank is torch.distributed.launch's: start with torchrun"
        elif unknown and (near := difflib.get_close_matches(unknown[1], self._option_string_actions, 1)):
            message = f"unknown flag {unknown[1]}, did you mean {near[0]}?"
        super().error(message)


def parse_args(dataclass, presets, description, argv=None):
    """The command line as a dataclass: its defaults, the preset's overrides, then the flags. Every field is a flag,
    which may be written with dashes."""
    usage = "%(prog)s [--preset NAME] [--SETTING VALUE ...]; --help lists every setting"
    parser = Parser(usage=usage, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=presets, default="gpt2", help="a named set of overrides (default: gpt2)")
    comments, kinds = comments_of(dataclass), typing.get_type_hints(dataclass)
    for field in fields(dataclass):
        text = f"{comments.get(field.name, '')} (default: {field.default!r})".strip().replace("%", "%%")
        flag = {"type": functools.partial(parse, kind=kinds[field.name]), "help": text}
        if bool in options(kinds[field.name]):
            names = f"--no-{field.name}", f"--no_{field.name}"
            parser.add_argument(*names, dest=field.name, action="store_false", help="switches it off")
            flag |= {"nargs": "?", "const": True, "metavar": "BOOL"}
        parser.add_argument(f"--{field.name}", **flag)
    words = map(with_underscores, sys.argv[1:] if argv is None else argv)
    flags = vars(parser.parse_args(list(words)))
    return dataclass(**{**presets[flags.pop("preset")], **flags})


# -----------------------------------------------------------------------------
# What can run


def problems(c, world_size, model_names):
    """Yield what cannot run, as messages with the remedy. c: the settings, None where this code does not have one."""
    if c.n_head and c.n_embd % c.n_head:
        yield f"n_embd {c.n_embd} is not divisible by n_head {c.n_head}: choose a multiple"
    if c.total_batch_size and c.micro_batch_size:
        unit = c.sequence_length * world_size
        sequences, rest = divmod(c.total_batch_size, unit)  # of each rank in a step
        if rest or sequences % min(sequences, c.micro_batch_size):
            unit *= min(c.micro_batch_size, max(1, round(c.total_batch_size / unit)))  # micro-batches of all ranks
            near = max(1, round(c.total_batch_size / unit)) * unit
            yield (
                f"total_batch_size {c.total_batch_size} is not divisible by micro_batch_size {c.micro_batch_size} x "
                f"sequence_length {c.sequence_length} x {world_size} ranks: give another micro_batch_size, or "
                f"--total_batch_size {near}"
            )
    names = ("scratch", "resume", *model_names)
    if c.init_from and c.init_from not in names and (missing := why_missing(c.init_from)):
        yield f"init_from {c.init_from!r} is not a file and none of {', '.join(names)}: {missing}"
    if c.vocab_size and c.vocab_size < VOCAB_SIZE and (c.sample_every or c.hellaswag_every):
        zeros = "--sample_every 0 --hellaswag_every 0"
        yield f"vocab_size {c.vocab_size} is below GPT-2's {VOCAB_SIZE} tokens: give at least that many, or {zeros}"
    if c.tracker and not find_spec(c.tracker):
        yield f"tracker is {c.tracker!r}, which is not installed: pip install {c.tracker}, or leave out --tracker"
    if c.sample_every and c.sample_prompt == "":
        yield "sample_prompt is empty: set a prompt, or --sample_every 0"


class OrNone(argparse.Namespace):
    def __getattr__(self, name):  # of a setting that this code does not have
        return None


def check(c, world_size, model_names):
    """Return the settings as plain values. Raises UserError, with the remedy, for those that cannot run."""
    c = plain(c)
    for name, (least, most) in RANGES.items():
        value = getattr(c, name, None)
        if value is not None and not least <= value <= most:  # also rejects NaN
            limit = f"{least} or more" if value < least else f"from {least} to {most}"
            raise UserError(f"{name} is {value}: it must be {limit}")
    for name, choices in CHOICES.items():
        if getattr(c, name, choices[0]) not in choices:
            names = " ".join(choice or "empty" for choice in choices)
            raise UserError(f"{name} is {getattr(c, name)!r}: it must be one of {names}")
    for problem in problems(OrNone(**vars(c)), world_size, model_names):
        raise UserError(problem)
    return c
