"""
Read a GPT-2 in Hugging Face's layout: OpenAI's from the hub, or a folder with config.json and the weights.
"""

import json
import os
import sys
from pathlib import Path

import torch

from lib.console import UserError, say
from lib.tokenizer import EOT, VOCAB_SIZE, get_tokenizer

CONFIG = {"block_size": "n_positions", **{name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}}
FIXED = {  # what our code computes; also the defaults of the fields that a config.json leaves out
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True,
}  # fmt: skip
TIED = ("transformer.wte.weight", "lm_head.weight")
CONVERT = "convert it with {}, then give NEW: GPT2LMHeadModel.from_pretrained(FOLDER, {}).save_pretrained('NEW')"
OTHER_FORMATS = {  # what to do with weights for other programs, by the end of the file's name
    ".gguf": CONVERT.format("transformers", "gguf_file=FILE"),
    ".h5": CONVERT.format("transformers 4", "from_tf=True"),
    ".json": "it holds no weights: give the folder that it lies in to --init_from or tools.sample, without an import",
}


def transposed(name, weight):
    """OpenAI's linear layers were 1x1 convolutions, with weights (in, out) where nn.Linear has (out, in)."""
    return weight.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else weight


def describe(error):
    """The type and text of an error; of torch's unpickler only the reason, not how to switch its protection off."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].split("Please use")[0].split("Check the doc")[0]
    return f"{type(error).__name__}: {' '.join(text.split())}"


def read_json(path):
    """The JSON object in a file."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(contents, dict):
        raise UserError(f"cannot read {path}: it holds a JSON {type(contents).__name__}, not an object")
    return contents


def read_weights(path):
    """What a .safetensors holds, tensors by name, or a file by torch.save with plain data. No code in it is run."""
    if advice := OTHER_FORMATS.get(path.suffix):
        raise UserError(f"{path} is neither safetensors nor by torch.save: {advice}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file raises in torch or safetensors
        raise UserError(f"cannot read {path}: {describe(error)}") from None


def named_as_ours(weights, path):
    """The weights of a GPT-2 under GPT's names, in the shapes that they have; each of the tied matrices is enough."""
    ours = {}
    for name, weight in weights.items():
        name = name if name == "lm_head.weight" else "transformer." + name.removeprefix("transformer.")
        if not torch.is_tensor(weight):
            raise UserError(f"{path} holds no GPT-2: {name} is not a tensor but of type {type(weight).__name__}")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, in old files
            ours[name] = weight.float()
    for name, other in (TIED, TIED[::-1]):
        if other in ours:
            ours.setdefault(name, ours[other])  # rebuild refuses one that differs
    return ours


def read_config(path):
    """The fields of GPTConfig from a config.json. Raises UserError if it describes another model."""
    config = read_json(path)
    other = [f"{name} {config[name]}, not {value}" for name, value in FIXED.items() if config.get(name, value) != value]
    other += [f"no {name}" for name in CONFIG.values() if name not in config]
    if other:
        raise UserError(f"{path} is not a GPT-2 that this code supports: it has {'; '.join(other)}")
    return {our: config[their] for our, their in CONFIG.items()}


def vocabulary():
    """OpenAI's vocab.json: {text of a token: id}. The text has a printable character for each byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]  # get printable names, too, as in OpenAI's encoder.py
    names = {**{byte: chr(byte) for byte in kept}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    tokens = map(get_tokenizer().decode_single_token_bytes, range(EOT))
    return {**{"".join(names[byte] for byte in token): id for id, token in enumerate(tokens)}, "<|endoftext|>": EOT}


def check_tokenizer(folder):
    """Raise UserError if the tokenizer beside the weights is not GPT-2's: their ids would mean other tokens."""
    for path in [folder / name for name in ("vocab.json", "tokenizer.json") if (folder / name).exists()]:
        theirs = read_json(path)
        if path.name == "tokenizer.json":
            added = {token["content"]: token["id"] for token in theirs.get("added_tokens", [])}
            theirs = {**dict(theirs.get("model", {}).get("vocab", {})), **added}
        if differing := [text for text, id in vocabulary().items() if theirs.get(text) != id]:
            raise UserError(
                f"{path} is not GPT-2's tokenizer: {len(differing):,} of its {VOCAB_SIZE:,} tokens have other ids or "
                f"none, such as {differing[0]!r}. This code has GPT-2's alone, so these weights would compute nonsense"
            )


def read_folder(folder):
    """(config, weights) of a folder: the fields of GPTConfig from config.json, and tensors by GPT's names from
    model.safetensors, in one file or several, or pytorch_model.bin. Matrices are as OpenAI's, (in, out).

    Raises UserError for another model or tokenizer, and for files that cannot be read.
    """
    name, folder = folder, Path(folder)
    kinds = ("model*.safetensors", "pytorch_model*.bin", "*.gguf", "*.h5")
    files = next((files for kind in kinds if (files := sorted(folder.glob(kind)))), None)
    if not files:
        raise UserError(f"cannot load {name}/ as a GPT-2 of config.json and model.safetensors: it has no weights")
    weights = {name: weight for path in files for name, weight in read_weights(path).items()}
    config = read_config(folder / "config.json")
    check_tokenizer(folder)
    return config, named_as_ours(weights, folder)


def fetch_openai(name):
    """OpenAI's model of that name, as from read_folder, from the hub or its local cache."""
    if os.path.exists(name):
        say(f"{name} means OpenAI's weights: for the local file or folder of that name, write ./{name}", sys.stderr)
    try:
        from huggingface_hub import hf_hub_download

        config = hf_hub_download(name, "config.json")
        hf_hub_download(name, "model.safetensors")
    except Exception as error:  # of huggingface_hub, its HTTP client, Xet or the file system, which say it best
        raise UserError(
            f"cannot fetch {name} from the Hugging Face hub: {describe(error)} If there is no network here, copy the "
            f"model's folder from another machine. For a local folder of that name, write ./{name}"
        ) from None
    return read_folder(Path(config).parent)


def to_ours(config, weights):
    """What read_folder returns, as lib.model.load.rebuild takes it."""
    return {"config": config, "model": {name: transposed(name, weight) for name, weight in weights.items()}}
