"""Build a model from saved weights, ours or others', or raise an error that says what does not match."""

import contextlib
import importlib
import os
import sys
from dataclasses import MISSING, asdict, fields, replace

import torch
from torch.overrides import TorchFunctionMode

from lib.checkpoint import load_checkpoint, newest_checkpoint
from lib.config import plain
from lib.console import UserError, print0, say
from lib.files import ROOT, expand, hash_file, why_missing
from lib.model.hugging_face import OPENAI_MODELS, fetch_openai, read_folder
from lib.tokenizer import VOCAB_SIZE

SIZES = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd"}  # of a GPTConfig


class NoRandomWeights(TorchFunctionMode):
    """Parameters made within stay uninitialized, for a checkpoint to replace: 124M random numbers take 2 seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        tensor = (*args, *(kwargs or {}).values())[:1]
        if function.__name__.endswith(("normal_", "uniform_")) and isinstance(*tensor, torch.nn.Parameter):
            return tensor[0]
        return function(*args, **(kwargs or {}))


def match_config(saved, config_class, whose="the checkpoint's"):
    """A checkpoint's config as a config_class. Missing fields take their defaults; unknown fields are ignored if they
    are off (None, False, 0); both are reported. Raises UserError for other unknown fields and for invalid values."""
    known = [field.name for field in fields(config_class)]
    unknown = {name: value for name, value in saved.items() if name not in known}
    if switched_on := {name: value for name, value in unknown.items() if value}:
        raise UserError(
            f"the checkpoint's model has {switched_on} in its config, which this code's {config_class.__name__} does "
            "not have: use the code that it was trained with, or add the field"
        )
    try:
        config = plain(config_class(**{name: saved[name] for name in known if name in saved}))
    except (TypeError, UserError) as error:  # TypeError: a field without a default is missing
        raise UserError(f"{whose} model has an invalid config, {saved}: {error}") from None
    for name in [name for name in known if name not in saved]:
        print0(f"{name} is not in the checkpoint's config and takes its default, {getattr(config, name)!r}")
    for name, value in unknown.items():
        print0(f"{name} is {value!r} in the checkpoint and ignored, since this code has no such field")
    return config


def chosen(settings, config_class):
    """The fields of a model's config, but for sizes, to which these settings give another value than that of a model of
    the same sizes."""
    given = {field.name for field in fields(config_class) if hasattr(settings, field.name) and field.init}
    needed = {f.name for f in fields(config_class) if f.default is MISSING and f.default_factory is MISSING}
    default = config_class(**{name: getattr(settings, name) for name in given & (SIZES | needed)})
    values = {name: getattr(settings, name) for name in given - SIZES}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def rebuild(checkpoint, model_class, config_class, wanted=None):
    """The model of a checkpoint, on the CPU. Raises UserError if its weights do not match its config, or that does not
    match this code. wanted: the config of a run that starts from these weights: its settings win, but for the sizes,
    and weights that the checkpoint does not have are new."""
    config, weights = match_config(checkpoint["config"], config_class), checkpoint["model"]
    for name, value in chosen(wanted, config_class).items() if wanted else ():
        if value != getattr(config, name):
            print0(f"{name} is {value!r}, not {getattr(config, name)!r} as in the weights")
            config = replace(config, **{name: value})
    try:
        if config.n_layer > len(weights) or config.n_head < 1 or config.n_embd % config.n_head:
            raise ValueError(f"{len(weights)} weights, {config.n_embd} channels for {config.n_head} heads")
        # without memory: a wrong config can ask for any amount, even for more than there are addresses
        try:
            with torch.device("meta"), NoRandomWeights():
                meta = model_class(config)
        except Exception:  # a model that looks at its values when it is made
            meta = model_class(config)
        place = next(meta.parameters()).device
        shapes = {n: torch.empty_like(w, device=place) if torch.is_tensor(w) else w for n, w in weights.items()}
        new, unknown = meta.load_state_dict(shapes, strict=not wanted)
        if unknown:
            raise ValueError(f"unknown weights: {', '.join(unknown)}")
    except Exception as error:  # of the model's code, or a list of all weights that differ
        reason = " ".join(str(error).split())
        raise UserError(f"the checkpoint's model does not match its config {config}: {reason:.400}") from None
    tied = {}
    for name, parameter in meta.named_parameters(remove_duplicate=False):
        other = weights.get(tied.setdefault(parameter, name))
        if name in weights and other is not None and not torch.allclose(weights[name], other, 0, 0, equal_nan=True):
            raise UserError(f"the checkpoint's {name} differs from {tied[parameter]}, but this code ties them")
    if new:
        print0(f"new weights, which the checkpoint does not have: {', '.join(new)}")
    with contextlib.nullcontext() if wanted else NoRandomWeights():
        model = model_class(config)
    model.load_state_dict(weights, strict=not new)
    return model


def script_of(checkpoint):
    """(the module of the script that trained a checkpoint, None if it is not known or not here; why its model may be
    another one, or ""). People copy train_gpt2.py and change the copy."""
    name, digest = checkpoint.get("script", ("", ""))
    if not name:  # an older checkpoint, or an exported folder
        return None, ""
    if not (ROOT / name).is_file():
        return None, f"{name}, which trained this, is not in {ROOT}/"
    doubt = f"{name} has changed since it trained this" * (hash_file(ROOT / name) != digest)
    return importlib.import_module(name.removesuffix(".py")), doubt


@torch.no_grad()
def check_usable(name, model, block_size=1, vocab_size=VOCAB_SIZE):
    """Raise UserError if a model on the CPU is for shorter sequences or fewer tokens than these, or if its weights, or
    its logits of one token, are NaN or infinite."""
    found = model.config
    if found.block_size < block_size or found.vocab_size < vocab_size:
        sizes = f"a block_size of {found.block_size} and a vocab_size of {found.vocab_size}"
        raise UserError(f"{name} has {sizes}: {block_size} (of a run, its sequence_length) and {vocab_size} are needed")
    logits = model.eval()(torch.tensor([[0]]))[0]
    model.train()
    for part, tensor in {**dict(model.named_parameters()), "logits": logits}.items():
        if not tensor.isfinite().all():
            raise UserError(f"{name}: NaN or infinite values in {part}: use a checkpoint from before the run diverged")


def read_model(name, model_class):
    """What is in a checkpoint or the newest of a log_dir; an exported folder or an OpenAI model in the same form."""
    if name in OPENAI_MODELS:
        config, weights = fetch_openai(name)
    else:
        path = newest_checkpoint(expand(name))
        if missing := why_missing(path):
            raise UserError(f"{name!r} is neither a path nor one of {', '.join(OPENAI_MODELS)}: {missing}")
        if not os.path.isdir(path):
            return load_checkpoint(path)
        config, weights = read_folder(path)
    return {"config": config, "model": model_class.from_openai(weights)}


def load_model(name, model_class, config_class):
    """A model on the CPU, of the script that trained it, from what read_model accepts."""
    contents = read_model(name, model_class)
    script, doubt = script_of(contents)
    if doubt:
        say(f"warning: {doubt}", sys.stderr)
    if script:
        model_class, config_class = script.GPT, script.GPTConfig
    return rebuild(contents, model_class, config_class)


def initial_model(config, wanted, checkpoint, model_class, device):
    """(the model that a run starts with, the settings as they then are): from its own checkpoint, from scratch with the
    config `wanted`, or from other weights, which must be large enough, and whose sizes it takes."""
    wanted = match_config(asdict(wanted), type(wanted), "this run's")  # as a checkpoint will be read
    if checkpoint:
        model = rebuild(checkpoint, model_class, type(wanted))
    elif config.init_from == "scratch":
        model = model_class(wanted)
    else:
        print0(f"starting from {config.init_from}")
        contents = read_model(config.init_from, model_class)
        if doubt := script_of(contents)[1]:
            print0(f"note: {doubt}")
        model = rebuild(contents, model_class, type(wanted), wanted)
        check_usable(config.init_from, model, wanted.block_size, min(wanted.vocab_size, VOCAB_SIZE))  # not padded
    if config.init_from != "scratch":  # what was left at its default, and the sizes, are those of the weights
        theirs = {name: value for name, value in vars(model.config).items() if hasattr(config, name)}
        config = replace(config, **{**theirs, **chosen(config, type(wanted))})
    return model.to(device), config
