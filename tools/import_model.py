"""
Import a GPT-2 that another program saved, as a folder like those of tools/export_hf.py.

    python -m tools.import_model build-nanogpt/log/model_19072.pt my_gpt2
    python -m tools.import_model weights.safetensors my_gpt2 --n_head 12

It reads checkpoints of the tutorial and of nanoGPT, state dicts and safetensors, and runs no code from them. The
optimizer is not imported, so a run from the folder begins at step 0.
"""

import argparse
import contextlib
import re
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))  # python tools/import_model.py works, too
from lib.console import UserError, run_as_command, say
from lib.files import expand
from lib.model import hugging_face
from lib.model.load import check_usable, rebuild
from lib.tokenizer import VOCAB_SIZE
from tools.export_hf import new_folder, write_folder
from train_gpt2 import GPT, GPTConfig

HARMLESS = {*hugging_face.CONFIG, "bias", "dropout", "flash"}  # config fields that change nothing in a trained model
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|module|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


class Config:
    """Stands in for another program's GPTConfig: it gets the fields, and none of that program's code is run."""


def read_file(path):
    """(weights, config, others) of a file: tensors by its own names, the model's config, and all else that it has."""
    if path.is_dir() or ".index." in path.name:
        raise UserError(f"{path} needs no import, if it is Hugging Face's: give its folder where a model is expected")
    classes = []
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # not torch's format of today: read() says more
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    if strange := sorted(name for name in classes if name.split(".")[-1] != "GPTConfig"):
        raise UserError(
            f"{path} holds more than plain data, and loading it would run code: {', '.join(strange)}. Save plain data "
            "in the program that made it: torch.save({'model': model.state_dict(), 'config': vars(model.config)}, FILE)"
        )
    with torch.serialization.safe_globals([(Config, name) for name in classes]):
        contents = hugging_face.read(path)
    contents = {key: vars(part) if isinstance(part, Config) else part for key, part in contents.items()}
    name = next((name for name in ("model", "state_dict") if isinstance(contents.get(name), dict)), None)
    if name is None:
        return contents, {}, {}
    weights = contents.pop(name)
    config = contents.pop("model_args" if "model_args" in contents else "config", {})  # nanoGPT's config is of the run
    return weights, config if isinstance(config, dict) else {}, contents


def find_sizes(path, config, weights, n_head):
    """The fields of GPTConfig, from the shapes of the weights. They do not show n_head, of which a wrong one would load
    and compute nonsense: it must be in the file's config or in the config.json beside it, or be given."""
    if odd := [f"{name}={value!r}" for name, value in config.items() if name not in HARMLESS and value]:
        unknown = f"fields that this code does not know: {', '.join(odd)}"
        raise UserError(f"{path} may not be GPT-2, since its config has {unknown}. If not, save the state_dict alone")
    if path.suffix in (".safetensors", ".bin") and path.with_name("config.json").exists():
        config = hugging_face.read_config(path.with_name("config.json"))
        hugging_face.check_tokenizer(path.parent)
    needed = ("transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight")
    if missing := [name for name in needed if getattr(weights.get(name), "ndim", 0) != 2]:
        raise UserError(f"{path} holds no GPT-2: it has no matrix {missing[0]}, but {', '.join([*weights][:5])}, ...")
    sizes = {"n_layer": len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")})}
    sizes["vocab_size"], sizes["n_embd"] = weights["transformer.wte.weight"].shape
    sizes["block_size"] = len(weights["transformer.wpe.weight"])
    sizes["n_head"] = n_head or config.get("n_head")
    if not sizes["n_head"]:
        raise UserError(f"{path} does not say how many heads a block has: give --n_head (in OpenAI's, n_embd / 64)")
    for name in sizes.keys() - {"vocab_size"}:  # which may be padded
        if config.get(name, sizes[name]) != sizes[name]:
            raise UserError(f"the config of {path} has {name} {config[name]}, not {sizes[name]}")
    return sizes


def import_model(path, folder, n_head=None):
    path = Path(expand(path))
    folder = new_folder(folder)
    weights, config, others = read_file(path)
    weights = {WRAPPERS.sub("", str(name)): weight for name, weight in weights.items()}
    weights = hugging_face.named_as_ours(weights, path)
    sizes = find_sizes(path, config, weights, n_head)
    if others:
        say(f"note: not imported: {', '.join(map(str, others))}")
    if "iter_num" in others:
        say("note: nanoGPT uses the exact GELU, this code GPT-2's approximation: logits differ by thousandths")
    if (rows := sizes["vocab_size"] - VOCAB_SIZE) > 0:
        say(f"note: {rows} rows of the embedding, beyond GPT-2's {VOCAB_SIZE:,} tokens, are dropped as padding")
    if weights["transformer.h.0.attn.c_attn.weight"].size(0) == sizes["n_embd"]:  # (in, out), as in OpenAI's files
        weights = GPT.from_openai(weights)
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
    if not any(name.endswith(".bias") for name in weights):  # nanoGPT's bias=False
        say("note: the model has no biases: they are zeros, which change nothing")
        layers = [name for name in weights if not name.endswith(("wte.weight", "wpe.weight", "lm_head.weight"))]
        weights |= {name.removesuffix("weight") + "bias": torch.zeros(len(weights[name])) for name in layers}
    try:
        model = rebuild({"config": sizes, "model": weights}, GPT, GPTConfig)
    except UserError as error:
        raise UserError(f"cannot import {path}: {error}") from None
    check_usable(path, model)
    write_folder(folder, model, {"imported from": path.name})


def main():
    parser = argparse.ArgumentParser(description="Import a GPT-2 of another program", allow_abbrev=False)
    parser.add_argument("file", help="a checkpoint of another program, or weights")
    parser.add_argument("folder", help="the folder to create; it may exist if it is empty")
    parser.add_argument("--n_head", type=int, help="attention heads of a block, if the file does not say")
    run_as_command(import_model, *vars(parser.parse_args()).values())


if __name__ == "__main__":
    main()
