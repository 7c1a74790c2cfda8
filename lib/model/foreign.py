"""
Read a GPT-2 that another program saved: checkpoints of the tutorial and of nanoGPT, llm.c's files, bare state dicts,
safetensors.
"""

import json
import math
import os
import re
import shlex
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from lib.console import UserError
from lib.files import expand
from lib.model.hugging_face import CONFIG, differences, transposed, weight_shapes
from lib.tokenizer import VOCAB_SIZE

LLM_C = 20240326  # magic number of llm.c's files of weights; below, those of its other files
NO_WEIGHTS = {20240520: "tokens", 20240522: "tokens", 20240327: "a debug state", 20240527: "the optimizer's state"}
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|module|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# config fields that do not change what a trained model computes, or that follow from the shapes of its weights
HARMLESS = {*CONFIG, "dropout", "bias", "flash", "device", "dtype"}
OF_TRAINING = {"learning_rate", "max_lr", "lr", "batch_size", "total_batch_size", "max_iters", "max_steps"}
SAVE_PLAIN = (
    "in the program that made it, save plain data: torch.save({'model': model.state_dict(), 'config': "
    "vars(model.config)}, 'plain.pt')"
)


class Found(NamedTuple):
    """The contents of a file. weights: tensors by the file's own names; config: of the model, if the file has one;
    facts: other numbers; others: the names of what is not imported."""

    weights: dict
    config: dict = {}
    facts: dict = {}
    others: list = []
    is_nanogpt: bool = False


# -----------------------------------------------------------------------------
# The files


def read_llm_c(path):
    """A header of 256 int32 numbers, then the weights in float32 or bfloat16, without names."""
    size = path.stat().st_size
    header = torch.from_file(str(path), size=256, dtype=torch.int32).tolist() if size >= 1024 else [0] * 8
    _, version, T, V, L, n_head, C, padded = header[:8]
    V = padded if version > 1 else V
    dtype = torch.bfloat16 if version == 5 else torch.float32
    if version not in (1, 3, 5) or not 0 < L <= size or min(T, V, C) < 1:
        raise UserError(
            f"{path} is an llm.c file, but not of version 1, 3 or 5, which can be read: it begins {header[:8]}"
        )
    shapes = weight_shapes(T, V, L, C)
    expected = 1024 + dtype.itemsize * sum(map(math.prod, shapes.values()))
    if size != expected:
        raise UserError(f"{path} has {size:,} bytes, not the {expected:,} that its header implies: copy it again")
    numbers = torch.from_file(str(path), size=size // dtype.itemsize, dtype=dtype)[1024 // dtype.itemsize :]
    parts = numbers.split([math.prod(shape) for shape in shapes.values()])
    weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    return Found(weights, {"n_head": n_head})


def read_safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"reading {path} needs safetensors: pip install safetensors") from None
    return Found(load_file(path))


class Config:
    """Replaces another program's GPTConfig: it takes the fields, without running that program's code."""


def load_pickle(path):
    """Load what torch.save wrote. Its classes are checked before it is loaded: a pickle can run arbitrary code."""
    is_zip = zipfile.is_zipfile(path)
    classes = torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) if is_zip else []
    if strange := sorted(name for name in classes if name.split(".")[-1] != "GPTConfig"):
        raise UserError(
            f"{path} holds more than plain data, and loading it would run code: {', '.join(strange)}. To import it, "
            f"{SAVE_PLAIN}"
        )
    with torch.serialization.safe_globals([(Config, name) for name in classes]):
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)


def read_pickle(path):
    """Read a checkpoint, a dict with the weights and more, or the weights alone."""
    contents = load_pickle(path)
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, not a dict with weights: {SAVE_PLAIN}")
    parts = {name: vars(part) if isinstance(part, Config) else part for name, part in contents.items()}
    dicts = {name: part for name, part in {"": parts, **parts}.items() if isinstance(part, dict)}
    weights = next((name for name, part in dicts.items() if any(str(n).endswith("wte.weight") for n in part)), None)
    if weights is None:
        raise UserError(f"{path} holds no weights of a GPT-2, such as wte.weight: {SAVE_PLAIN}")
    # nanoGPT's model_args describe the model, its config the run
    named = next((name for name in ("model_args", "config", *dicts) if "n_head" in dicts.get(name, {})), None)
    config = dicts.get(named, {})
    if named == "" or config.keys() & OF_TRAINING:  # mixed with settings of the run
        config = {name: config[name] for name in HARMLESS & config.keys()}
    others = {name: part for name, part in parts.items() if weights and name not in (weights, named, *config)}
    facts = {name: getattr(part, "item", lambda part=part: part)() for name, part in others.items() if is_number(part)}
    others = [str(name) for name in others if name not in facts]
    return Found(dicts[weights], config, facts, others, is_nanogpt="model_args" in dicts)


def is_number(value):
    return isinstance(value, int | float) or (torch.is_tensor(value) and value.ndim == 0)


def read_any(path):
    """Read a file of any supported kind."""
    with open(path, "rb") as file:
        begin = file.read(9)
    magic = int.from_bytes(begin[:4], "little")
    if magic in NO_WEIGHTS:
        raise UserError(f"{path} is an llm.c file with {NO_WEIGHTS[magic]}, not with a model: give its model_*.bin")
    found = read_llm_c(path) if magic == LLM_C else (read_safetensors if begin[8:] == b"{" else read_pickle)(path)
    beside = path.with_name("config.json")
    if path.name in ("model.safetensors", "pytorch_model.bin") and beside.exists():
        theirs = json.loads(beside.read_text(encoding="utf-8"))
        if different := differences(theirs):
            raise UserError(f"{beside} is not a GPT-2 that this code supports: it has {'; '.join(different)}")
        found = found._replace(config={our: theirs[their] for our, their in CONFIG.items() if their in theirs})
    return found


# -----------------------------------------------------------------------------
# Their contents


def check_fields(config):
    """Raise UserError for an unknown field that is not off, since it may change what the model computes."""
    odd = {name: value for name, value in config.items() if name not in HARMLESS and value}
    if odd:
        raise UserError(
            "its config has fields that this code does not know, so it may not be GPT-2: "
            f"{', '.join(f'{name}={value!r}' for name, value in odd.items())}. If they change nothing, import the "
            "weights alone, torch.save(model.state_dict(), 'plain.pt'), with --n_head"
        )


def our_names(weights):
    """The weights by our names, without the prefixes that torch.compile, DDP and others add, and without masks."""
    weights = {WRAPPERS.sub("", str(name)): weight for name, weight in weights.items()}
    wte = next(name for name in weights if name.endswith("wte.weight"))
    prefix, ours = wte.removesuffix("wte.weight").removesuffix("transformer."), {}
    for name, weight in weights.items():
        name = name.removeprefix(prefix)
        if not torch.is_tensor(weight):
            raise UserError(f"its weights include {name}, which is not a tensor but of type {type(weight).__name__}")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, in old versions
            name = name if name == "lm_head.weight" else "transformer." + name.removeprefix("transformer.")
            ours[name] = weight
    return ours


def sizes(weights):
    """The fields of GPTConfig that follow from the shapes of the weights: all but n_head."""
    needed = [f"transformer.{name}.weight" for name in ("wte", "wpe", "h.0.attn.c_attn")]
    if missing := [name for name in needed if getattr(weights.get(name), "ndim", 0) != 2]:
        raise UserError(f"it is not a GPT-2: it has no matrix {missing[0]}, but {', '.join([*weights][:5])}, ...")
    blocks = [int(match[1]) for name in weights if (match := re.match(r"transformer\.h\.(\d+)\.", name))]
    if max(blocks) > len(weights):
        raise UserError(f"it has a block numbered {max(blocks)}, but only {len(weights)} weights")
    (V, C), (T, _) = weights[needed[0]].shape, weights[needed[1]].shape
    return {"block_size": T, "vocab_size": V, "n_layer": max(blocks) + 1, "n_embd": C}


def missing_biases(weights, shapes):
    """Zeros for the biases that no block has: they change nothing."""
    kinds = {}
    for name in shapes:
        if name.endswith(".bias"):
            kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    absent = [names for names in kinds.values() if not any(name in weights for name in names)]
    return {name: torch.zeros(shapes[name]) for names in absent for name in names}


def count_heads(config, n_head, n_embd):
    """n_head from the config, else as given. It is never guessed: a wrong one loads, and computes nonsense."""
    found = config.get("n_head", n_head)
    if found is None:
        like_gpt2 = f" (in GPT-2 it is n_embd / 64, here {n_embd // 64})" if n_embd % 64 == 0 else ""
        raise UserError(f"it does not say how many attention heads a block has: give --n_head{like_gpt2}")
    if n_head not in (None, found):
        raise UserError(f"its config has n_head {found}, not {n_head}: leave out --n_head")
    if not isinstance(found, int) or found < 1 or n_embd % found:
        raise UserError(f"n_head is {found!r}: it must divide n_embd, which is {n_embd}")
    return found


def read_foreign(path, n_head=None):
    """A GPT-2 from another program's file: (checkpoint, facts, notes).

    checkpoint: as lib.model.load.rebuild takes it; facts: other numbers in the file, by name; notes: what else the
    user should know. n_head is for files that do not have it. Raises UserError for what may not be a GPT-2.
    """
    path = Path(expand(path))
    if os.path.isdir(path):
        raise UserError(
            f"{path} is a folder: give a file in it. One with config.json and model.safetensors needs no import: "
            f"--init_from {shlex.quote(str(path))}"
        )
    try:
        found = read_any(path)
        check_fields(found.config)
        weights, notes = our_names(found.weights), []
        config = sizes(weights)
        weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])  # rebuild refuses one that differs
        for name in config.keys() - {"vocab_size"}:  # which may be padded
            if found.config.get(name, config[name]) != config[name]:
                raise UserError(f"its config has {name} {found.config[name]}, its weights have {config[name]}")
        config["n_head"] = count_heads(found.config, n_head, config["n_embd"])
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"cannot import {path}: {error}") from None
    except Exception as error:  # whatever a damaged file raises in torch, safetensors or json
        reason = str(error).split("\n")[0].split(". ")[0]  # torch then advises to run the code in the file
        raise UserError(
            f"cannot import {path}: it is truncated, damaged, or of an unknown kind ({reason}). Copy it again, or, "
            f"{SAVE_PLAIN}"
        ) from None
    if found.others:
        notes.append(f"not imported: {', '.join(found.others)}")
    if found.is_nanogpt:
        notes.append(
            "nanoGPT computes the exact GELU, this code GPT-2's tanh approximation: the logits differ by thousandths"
        )
    shapes = weight_shapes(*(config[name] for name in ("block_size", "vocab_size", "n_layer", "n_embd")))
    if not found.config.get("bias") and (zeros := missing_biases(weights, shapes)):
        weights |= zeros
        notes.append(f"{len(zeros)} biases that the model does not have are zeros, which change nothing")
    if len(weights["transformer.h.0.attn.c_attn.weight"]) == config["n_embd"]:  # (in, out), as in OpenAI's files
        weights = {name: transposed(name, weight) for name, weight in weights.items()}
    if (rows := config["vocab_size"] - VOCAB_SIZE) > 0:
        notes.append(f"{rows} rows of its embedding, beyond GPT-2's {VOCAB_SIZE:,} tokens, are dropped as padding")
    weights = {name: weight.float() for name, weight in weights.items()}
    return {"config": config, "model": weights}, found.facts, notes
