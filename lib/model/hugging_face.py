"""Read a GPT-2 in Hugging Face's layout: OpenAI's from the hub, or a folder with config.json and the weights."""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from lib.console import UserError, say
from lib.files import list_folder
from lib.foreign import recognize
from lib.tokenizer import EOT

OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONFIG = {"block_size": "n_positions", **{name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}}
FIXED = {  # what our code computes; also the defaults of the fields that a config.json leaves out
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True,
}  # fmt: skip
# sha256 of the texts in OpenAI's vocab.json, one per line
VOCABULARY = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"


def read(path):
    """The dict in a .json, a .safetensors, or a file by torch.save with plain data. No code in it is run."""
    try:
        if path.suffix == ".json":
            return {**json.loads(path.read_bytes())}
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return {**torch.load(path, map_location="cpu", weights_only=True)}
    except Exception as error:  # whatever a damaged file raises in torch or safetensors
        # of torch's unpickler only the reason, not how to switch its protection off
        reason = str(error).rpartition("WeightsUnpickler error:")[2].split("Please use")[0].split("Check the doc")[0]
        reason = f"{type(error).__name__}: {' '.join(reason.split())}"
        raise UserError(f"cannot read {path}: {reason}{recognize(path)}") from None


def named_as_ours(weights, path):
    """The weights of a GPT-2 under GPT's names, in float32 and in the shapes that they have. A file may hold only one
    of the tied matrices."""
    ours = {}
    for name, weight in weights.items():
        name = name if name == "lm_head.weight" else "transformer." + name.removeprefix("transformer.")
        if not torch.is_tensor(weight):
            raise UserError(f"{path} holds no GPT-2: {name} is not a tensor but of type {type(weight).__name__}")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, in old files
            ours[name] = weight.float()
    if "lm_head.weight" in ours:
        ours.setdefault("transformer.wte.weight", ours["lm_head.weight"])
    return ours


def read_config(path):
    """The fields of GPTConfig from a config.json. Raises UserError if it describes another model."""
    config = read(path)
    other = [f"{name} {config[name]}, not {value}" for name, value in FIXED.items() if config.get(name, value) != value]
    other += [f"no {name}" for name in CONFIG.values() if name not in config]
    if other:
        raise UserError(f"{path} is not a GPT-2 that this code supports: it has {'; '.join(other)}")
    return {our: config[their] for our, their in CONFIG.items()}


def check_tokenizer(folder):
    """Raise UserError if the tokenizer beside the weights is not GPT-2's: their ids would mean other tokens."""
    for path in [path for path in list_folder(folder) if path.suffix == ".model" or path.name == "vocab.txt"]:
        raise UserError(f"{path} is another model's tokenizer, and this code has only GPT-2's: use other weights")
    for path in [folder / name for name in ("vocab.json", "tokenizer.json") if (folder / name).exists()]:
        theirs = read(path)
        if path.name == "tokenizer.json":
            vocabulary = (theirs.get("model") or {}).get("vocab")
            theirs = {"<|endoftext|>": EOT, **(vocabulary if isinstance(vocabulary, dict) else {})}
        texts = sorted((text for text, id in theirs.items() if id <= EOT), key=theirs.get)  # others were added
        if hashlib.sha256("\n".join(texts).encode()).hexdigest() != VOCABULARY:
            raise UserError(f"{path} is not GPT-2's tokenizer, the only one that this code has: use other weights")


def read_folder(name):
    """(config, weights) of a folder: the fields of GPTConfig, and tensors by GPT's names, with OpenAI's matrices, (in,
    out). Raises UserError for another model or tokenizer, and for files that cannot be read."""
    folder = Path(name)
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        wanted = "config.json and model.safetensors or pytorch_model.bin"
        raise UserError(f"cannot load {name}/ as a GPT-2 of {wanted}: it has no weights{recognize(folder)}")
    weights = {name: weight for path in files for name, weight in read(path).items()}
    check_tokenizer(folder)
    return read_config(folder / "config.json"), named_as_ours(weights, folder)


def fetch_openai(name):
    """OpenAI's model of that name, as from read_folder, from the hub or its local cache."""
    if name not in OPENAI_MODELS:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(OPENAI_MODELS)}")
    if os.path.exists(name):
        say(f"{name} means OpenAI's weights: for the local file or folder of that name, write ./{name}", sys.stderr)
    try:
        from huggingface_hub import hf_hub_download

        config = hf_hub_download(name, "config.json")
        hf_hub_download(name, "model.safetensors")
    except Exception as error:  # of huggingface_hub, its HTTP client, Xet or the file system, which say it best
        failed = f"cannot fetch {name} from the Hugging Face hub: {type(error).__name__}: {error}"
        raise UserError(f"{failed} For a local folder of that name, write ./{name}") from None
    return read_folder(Path(config).parent)
