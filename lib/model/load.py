"""
Build a model from saved weights, ours or others', or raise an error that says what does not match.
"""

import os
from dataclasses import MISSING, fields

import torch
from torch.overrides import TorchFunctionMode

from lib.checkpoint import load_checkpoint, newest_checkpoint
from lib.console import UserError, print0
from lib.files import expand, why_missing
from lib.model import hugging_face
from lib.tokenizer import VOCAB_SIZE

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")  # of a GPTConfig, 1 or more
OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


class NoRandomWeights(TorchFunctionMode):
    """Parameters made within stay uninitialized, to be replaced by a checkpoint's. This saves a second of random
    numbers for 124M, and another on the meta device, where the first one imports torch's compiler. (A model made on the
    meta device and assigned to would lack the buffers that no checkpoint holds.)"""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        tensor = (*args, *(kwargs or {}).values())[:1]
        if function.__name__.endswith(("normal_", "uniform_")) and isinstance(*tensor, torch.nn.Parameter):
            return tensor[0]
        return function(*args, **(kwargs or {}))


def on_meta(model_class, config):
    """A model that takes no memory, to count its parameters."""
    with torch.device("meta"), NoRandomWeights():
        return model_class(config)


def match_config(saved, config_class):
    """A checkpoint's config as a config_class. Missing fields take their defaults; unknown fields are ignored if they
    are off (None, False, 0); both are reported. Raises UserError for other unknown fields and for invalid values."""
    known = {field.name: field.default for field in fields(config_class)}
    missing, unknown = [[n for n in a if n not in b] for a, b in ((known, saved), (saved, known))]
    if lacking := [name for name in missing if known[name] is MISSING]:
        raise UserError(f"the checkpoint's model has no {', '.join(lacking)} in its config {saved}")
    if foreign := {name: saved[name] for name in unknown if saved[name]}:
        raise UserError(
            f"the checkpoint's model has {foreign} in its config, which this code's {config_class.__name__} does not "
            "have: use the code that it was trained with, or add the field"
        )
    for field in fields(config_class):
        value, kind = saved.get(field.name, field.default), type(field.default)
        if field.name in SIZES and (type(value) is not int or value < 1):
            raise UserError(f"the checkpoint's model has {field.name} {value!r} in its config: it must be 1 or more")
        if field.default is not None and not isinstance(value, float | int if kind is float else kind):
            raise UserError(f"the checkpoint's model has {field.name} {value!r}, not of type {kind.__name__}")
    notes = [f"{name} is not in the checkpoint and takes its default, {known[name]!r}" for name in missing]
    notes += [
        f"{name} is {saved[name]!r} in the checkpoint and ignored, since this code has no such field"
        for name in unknown
    ]
    for note in notes:
        print0(f"{config_class.__name__}: {note}")
    return config_class(**{name: value for name, value in saved.items() if name in known})


def rebuild(checkpoint, model_class, config_class):
    """The model of a checkpoint, on the CPU. Raises UserError if its weights do not match its config, or its config
    does not match this code."""
    config, weights = match_config(checkpoint["config"], config_class), checkpoint["model"]
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
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            raise UserError(
                f"the checkpoint's model does not match its config {checkpoint['config']}: {name} has the shape "
                f"{found.get(name)}, not {expected.get(name)}"
            )
    tied = {}
    for name, parameter in meta.named_parameters(remove_duplicate=False):
        other = tied.setdefault(parameter, name)
        if other != name and not torch.equal(weights[name], weights[other]):
            raise UserError(f"the checkpoint's {name} and {other} differ, but this code ties them: it is another model")
    with NoRandomWeights():
        model = model_class(config)
    model.load_state_dict(weights)
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


def from_openai(name, model_class, config_class):
    """OpenAI's weights from the Hugging Face hub."""
    if name not in OPENAI_MODELS:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(OPENAI_MODELS)}")
    return rebuild(hugging_face.to_ours(*hugging_face.fetch_openai(name)), model_class, config_class)


def load_model(name, model_class, config_class):
    """A model on the CPU, from an OpenAI model name, a checkpoint, a log_dir (its newest checkpoint), or a folder by
    tools/export_hf.py."""
    if name in OPENAI_MODELS:
        return from_openai(name, model_class, config_class)
    path = newest_checkpoint(expand(name))
    if missing := why_missing(path):
        names = ", ".join(OPENAI_MODELS)
        raise UserError(f"{name!r} is not a checkpoint, a log_dir, an exported folder or one of {names}: {missing}")
    is_folder = os.path.isdir(path)
    checkpoint = hugging_face.to_ours(*hugging_face.read_folder(path)) if is_folder else load_checkpoint(path)
    return rebuild(checkpoint, model_class, config_class)


def initial_model(init_from, model_config, checkpoint, model_class):
    """The model that a run starts with, on the CPU: from its own checkpoint, from scratch with model_config, or from
    other weights, which must support its sequence length and vocabulary."""
    if checkpoint:
        return rebuild(checkpoint, model_class, type(model_config))
    if init_from == "scratch":
        return model_class(model_config)
    init_from = init_from if init_from in OPENAI_MODELS else newest_checkpoint(init_from)
    print0(f"starting from {init_from}")
    model = load_model(init_from, model_class, type(model_config))
    T, V = model_config.block_size, model_config.vocab_size
    if model.config.block_size < T or model.config.vocab_size < min(V, VOCAB_SIZE):  # OpenAI's have no padded ids
        raise UserError(
            f"{init_from} has a block_size of {model.config.block_size} and a vocab_size of {model.config.vocab_size}: "
            f"lower sequence_length from {T} and vocab_size from {V} to these"
        )
    return model
