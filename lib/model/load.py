"""
Build a model from saved weights, ours or others', or raise an error that says what does not match.
"""

import importlib
import os
import re
import sys
from dataclasses import MISSING, fields, replace
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from lib.checkpoint import load_checkpoint, newest_checkpoint
from lib.config import plain
from lib.console import UserError, print0
from lib.files import ROOT, expand, hash_file, why_missing
from lib.model import hugging_face
from lib.tokenizer import VOCAB_SIZE

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")  # of a GPTConfig, 1 or more
OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


class NoRandomWeights(TorchFunctionMode):
    """Parameters made within stay uninitialized, to be replaced by a checkpoint's. This saves a second of random
    numbers for 124M, and another on the meta device, where the first one imports torch's compiler. (Building on meta
    and assigning would leave non-persistent buffers on meta.)"""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        tensor = (*args, *(kwargs or {}).values())[:1]
        if function.__name__.endswith(("normal_", "uniform_")) and isinstance(*tensor, torch.nn.Parameter):
            return tensor[0]
        return function(*args, **(kwargs or {}))


def on_meta(model_class, config):
    """A model that takes no memory, to count its parameters."""
    with torch.device("meta"), NoRandomWeights():
        return model_class(config)


# -----------------------------------------------------------------------------
# Configs


def match_config(saved, config_class):
    """A checkpoint's config as a config_class. Missing fields take their defaults; unknown fields are ignored if they
    are off (None, False, 0); both are reported. Raises UserError for other unknown fields and for invalid values."""
    known = {field.name: field for field in fields(config_class)}
    missing = [name for name in known if name not in saved]
    unknown = [name for name in saved if name not in known]
    required = [n for n in missing if known[n].default is MISSING and known[n].default_factory is MISSING]
    if required:
        raise UserError(f"the checkpoint's model has no {', '.join(required)} in its config {saved}")
    if foreign := {name: saved[name] for name in unknown if saved[name]}:
        raise UserError(
            f"the checkpoint's model has {foreign} in its config, which this code's {config_class.__name__} does not "
            "have: use the code that it was trained with, or add the field"
        )
    for name in known.keys() & saved.keys() & set(SIZES):
        if type(saved[name]) is not int or saved[name] < 1:
            raise UserError(f"the checkpoint's model has {name} {saved[name]!r} in its config: it must be 1 or more")
    try:
        config = plain(config_class(**{name: value for name, value in saved.items() if name in known}))
    except UserError as error:
        raise UserError(f"the checkpoint's model has an invalid config: {error}") from None
    for name in missing:
        default = getattr(config, name)
        print0(f"{config_class.__name__}: {name} is not in the checkpoint and takes its default, {default!r}")
    for name in unknown:
        print0(
            f"{config_class.__name__}: {name} is {saved[name]!r} in the checkpoint and ignored, since this code has no "
            "such field"
        )
    return config


def with_settings(saved, wanted):
    """The saved config of a model, with the fields of `wanted` that are no sizes and differ from their defaults: a run
    from other weights has been told to use these. They are reported."""
    defaults = {field.name: field.default for field in fields(wanted)}
    defaults |= {f.name: f.default_factory() for f in fields(wanted) if f.default_factory is not MISSING}
    chosen = {
        name: getattr(wanted, name)
        for name, default in defaults.items()
        if name not in SIZES and getattr(wanted, name) not in (default, getattr(saved, name))
    }
    for name, value in chosen.items():
        print0(f"{name} is {value!r}, not {getattr(saved, name)!r} as in the weights")
    return replace(saved, **chosen)


# -----------------------------------------------------------------------------
# Weights


def script_classes(checkpoint, model_class, config_class):
    """The model's classes from the script that trained it, if that is another one beside this one: people copy
    train_gpt2.py and change the copy. Says if it is no longer there, or was changed since."""
    name, digest = checkpoint.get("script", ["", ""])
    own = Path(sys.modules[model_class.__module__].__file__).name
    if not re.fullmatch(r"\w+\.py", name):
        return model_class, config_class
    if not (ROOT / name).is_file():
        print0(f"warning: trained by {name}, which is not in {ROOT}/: the model is that of {own}")
        return model_class, config_class
    if name == own:
        return model_class, config_class
    module = importlib.import_module(name.removesuffix(".py"))
    return module.GPT, module.GPTConfig


def trained_by(checkpoint):
    """Why the script beside this one is not the one that trained a checkpoint, as text; "" if it is."""
    name, digest = checkpoint.get("script", ["", ""])
    if not name:
        return ""
    if not (ROOT / name).is_file():
        return f"it was trained by {name}, which is not in {ROOT}/"
    return "" if hash_file(ROOT / name) == digest else f"{name} has changed since it trained this"


def rebuild(checkpoint, model_class, config_class, wanted=None):
    """The model of a checkpoint, on the CPU. Raises UserError if its weights do not match its config, or its config
    does not match this code.

    wanted: the config of a run that starts from these weights, which chooses its settings but not its sizes. Weights
    that it adds are then new.
    """
    config, weights = match_config(checkpoint["config"], config_class), checkpoint["model"]
    if wanted:
        config = with_settings(config, wanted)
    found = {name: tuple(getattr(weight, "shape", ())) for name, weight in weights.items()}
    try:
        if config.n_layer > len(weights) or config.n_embd % config.n_head:
            raise ValueError(f"{len(weights)} weights, {config.n_embd} channels for {config.n_head} heads")
        # without memory: a wrong config can ask for any amount, even for more than there are addresses
        meta = on_meta(model_class, config)
        expected = {name: tuple(weight.shape) for name, weight in meta.state_dict().items()}
    except (RuntimeError, TypeError, ValueError, ArithmeticError, AttributeError, AssertionError) as error:
        raise UserError(
            f"the checkpoint's model cannot be built from its config {checkpoint['config']}: {error}"
        ) from None
    new = [name for name in expected if name not in found] if wanted else []
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name) and name not in new:
            raise UserError(
                f"the checkpoint's model does not match its config {checkpoint['config']}: {name} has the shape "
                f"{found.get(name)}, not {expected.get(name)}"
            )
    tied = {}
    for name, parameter in meta.named_parameters(remove_duplicate=False):
        other = tied.setdefault(parameter, name)
        if name in found and other in found and not torch.equal(weights[name], weights[other]):
            raise UserError(f"the checkpoint's {name} and {other} differ, but this code ties them: it is another model")
    if new:
        print0(
            f"new weights, which the checkpoint does not have: {', '.join(new[:9])}{', ...' if len(new) > 9 else ''}"
        )
        model = model_class(config)
    else:
        with NoRandomWeights():
            model = model_class(config)
    model.load_state_dict(weights, strict=not new)
    return model


def check_vocabulary(name, config):
    """Raise UserError if a model of this config does not have all tokens of GPT-2."""
    if config.vocab_size < VOCAB_SIZE:
        raise UserError(
            f"{name} has a vocabulary of {config.vocab_size} ids: this needs all {VOCAB_SIZE} tokens of GPT-2"
        )


@torch.no_grad()
def check_finite(name, model):
    """Raise UserError if weights of a model on the CPU, or its logits of one token, are NaN or infinite."""
    for part, tensor in {**model.state_dict(), "logits": model.eval()(torch.tensor([[0]]))[0]}.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name}: {part} has NaN or infinite values: use a checkpoint from before the run diverged")


def read_model(name):
    """The contents of a checkpoint, the newest of a log_dir, or of a folder by tools/export_hf.py or an OpenAI model in
    the same form."""
    if name in OPENAI_MODELS:
        return hugging_face.to_ours(*hugging_face.fetch_openai(name))
    path = newest_checkpoint(expand(name))
    if missing := why_missing(path):
        names = ", ".join(OPENAI_MODELS)
        raise UserError(f"{name!r} is not a checkpoint, a log_dir, an exported folder or one of {names}: {missing}")
    return hugging_face.to_ours(*hugging_face.read_folder(path)) if os.path.isdir(path) else load_checkpoint(path)


def from_openai(name, model_class, config_class):
    """OpenAI's weights from the Hugging Face hub."""
    if name not in OPENAI_MODELS:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(OPENAI_MODELS)}")
    return rebuild(hugging_face.to_ours(*hugging_face.fetch_openai(name)), model_class, config_class)


def load_model(name, model_class, config_class):
    """A model on the CPU, of the script that trained it, from what read_model accepts."""
    contents = read_model(name)
    return rebuild(contents, *script_classes(contents, model_class, config_class))


def initial_model(config, wanted, checkpoint, model_class, device):
    """(the model that a run starts with, the settings as they then are): from its own checkpoint, from scratch with the
    config `wanted`, or from other weights, which must support its sequence length and vocabulary, and whose sizes it
    takes."""
    wanted = plain(wanted)
    if checkpoint:
        model = rebuild(checkpoint, model_class, type(wanted))
    elif config.init_from == "scratch":
        model = model_class(wanted)
    else:
        print0(f"starting from {config.init_from}")
        model = rebuild(read_model(config.init_from), model_class, type(wanted), wanted)
        T, V = wanted.block_size, wanted.vocab_size
        if model.config.block_size < T or model.config.vocab_size < min(V, VOCAB_SIZE):  # OpenAI's have no padded ids
            raise UserError(
                f"{config.init_from} has a block_size of {model.config.block_size} and a vocab_size of "
                f"{model.config.vocab_size}: lower sequence_length from {T} and vocab_size from {V} to these"
            )
    return model.to(device), as_loaded(config, model.config)


def as_loaded(config, model_config):
    """The settings of a run that starts from other weights, with what came from there: the sizes, and settings that
    were left at their default."""
    if config.init_from == "scratch":
        return config
    same = {field.name: field.default for field in fields(model_config) if hasattr(config, field.name)}
    theirs = [name for name, default in same.items() if name in SIZES or getattr(config, name) == default]
    return replace(config, **{name: getattr(model_config, name) for name in theirs})
