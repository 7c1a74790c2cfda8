"""
GPT-2 in Hugging Face's layout: config and weights, converted to and from ours, and the vocabulary as text.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch

from lib.console import UserError, say
from lib.tokenizer import EOT, get_tokenizer

CONFIG = {"block_size": "n_positions", **{name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}}
FIXED = {  # what our code computes; also the defaults of the fields that a config.json leaves out
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True,
}  # fmt: skip
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # the default in transformers is 0.1, in training


def weight_shapes(block_size, vocab_size, n_layer, n_embd):
    """{name: shape} of the weights of a GPT-2, by our names and in llm.c's order: kind by kind over all blocks."""
    C, shapes = n_embd, {"transformer.wte.weight": (vocab_size, n_embd), "transformer.wpe.weight": (block_size, n_embd)}
    kinds = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
    kinds |= {"ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    for kind, shape in kinds.items():
        for part, size in (("weight", shape), ("bias", shape[:1])):
            shapes |= {f"transformer.h.{i}.{kind}.{part}": size for i in range(n_layer)}
    return {**shapes, "transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}


def transposed(name, weight):
    """OpenAI's linear layers were 1x1 convolutions, with weights (in, out) where nn.Linear has (out, in)."""
    return weight.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else weight


def to_theirs(config, weights):
    """Our config and weights (dicts) as theirs, without the padding rows of the vocabulary and without the head, which
    is the embedding. Raises UserError if the weights are not those of a GPT-2."""
    shapes = weight_shapes(*(config[name] for name in ("block_size", "vocab_size", "n_layer", "n_embd")))
    if strange := sorted(weights.keys() - {"lm_head.weight"} ^ shapes.keys()):
        raise UserError(f"the model is no longer GPT-2: additional or missing weights, {', '.join(strange[:3])}")
    wte = weights["transformer.wte.weight"]
    if not torch.equal(weights.get("lm_head.weight", wte), wte):
        raise UserError("the model is no longer GPT-2: its head, lm_head.weight, differs from its embedding")
    theirs = {their: config[our] for our, their in CONFIG.items()}
    theirs |= {"vocab_size": EOT + 1, "bos_token_id": EOT, "eos_token_id": EOT, **FIXED, **DROPOUT}
    theirs |= {"architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    theirs["n_ctx"] = theirs["n_positions"]  # its old name, which llama.cpp reads
    weights = {name: transposed(name, weight) for name, weight in weights.items() if name != "lm_head.weight"}
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: EOT + 1]
    return theirs, {name: weight.contiguous() for name, weight in weights.items()}


def differences(config):
    """The settings of their config (a dict) that our code does not support, as a list of texts."""
    return [f"{name} {config[name]}, not {value}" for name, value in FIXED.items() if config.get(name, value) != value]


def to_ours(config, weights):
    """Their config and weights (dicts) as lib.model.load.rebuild takes them. Raises UserError for any other model."""
    other = differences(config)
    if missing := [name for name in CONFIG.values() if name not in config]:
        other += [f"no {', '.join(missing)}"]
    if other:
        raise UserError(f"its config is not a GPT-2 that this code supports: it has {'; '.join(other)}")
    ours = {}
    for name, weight in weights.items():
        name = name if name == "lm_head.weight" else "transformer." + name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, in old files
            ours[name] = transposed(name, weight).float()
    ours.setdefault("lm_head.weight", ours.get("transformer.wte.weight"))  # rebuild refuses one that differs
    return {"config": {our: config[their] for our, their in CONFIG.items()}, "model": ours}


def read_safetensors(path):
    """The tensors of a .safetensors by name: 8 bytes for the length of a JSON header, the header, then the numbers
    (https://github.com/huggingface/safetensors). Raises ValueError or KeyError for an invalid file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size - 8 - length
        if size < 0:
            raise ValueError(f"{path} is shorter than its header says")
        header = json.loads(file.read(length))
        data = bytearray(size)
        if file.readinto(data) != size:
            raise ValueError(f"{path} became shorter while it was read")
    tensors = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (start, end) = DTYPES[about["dtype"]], about["shape"], about["data_offsets"]
        if not 0 <= start <= end <= size or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path} has no room for {name} of shape {shape} at bytes {start} to {end}")
        tensor = (
            torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=start)
            if end > start
            else torch.empty(0, dtype=dtype)
        )
        tensors[name] = tensor.reshape(shape)
    return tensors


def read_folder(folder):
    """A folder with config.json and model.safetensors, as lib.model.load.rebuild takes it. May raise UserError."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return to_ours(config, read_safetensors(Path(folder) / "model.safetensors"))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot load {folder}/ as a GPT-2 of config.json and model.safetensors: {error}") from None


def fetch(name):
    """OpenAI's weights of that name, as from read_folder, from the hub or its local cache."""
    from huggingface_hub import hf_hub_download

    if os.path.exists(name):
        say(f"{name} means OpenAI's weights: for the local file or folder of that name, write ./{name}", sys.stderr)
    try:
        config, _ = (hf_hub_download(name, file) for file in ("config.json", "model.safetensors"))
    except Exception as error:  # from huggingface_hub, its HTTP client, Xet or the file system
        reason = " ".join(str(error).split()) or repr(error)
        raise UserError(
            f"cannot fetch {name} from the Hugging Face hub, check the network: {reason} For a local folder of "
            f"that name, write ./{name}"
        ) from None
    return read_folder(Path(config).parent)


def split(token, ranks):
    """The two tokens that were merged into this one (bytes), found by applying the merges of lower ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, EOT) for a, b in zip(parts, parts[1:], strict=False)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def vocabulary():
    """OpenAI's vocab.json, a dict from text to id, and the merges of its merges.txt, from the ranks in assets/."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]  # get printable names, too, as in OpenAI's encoder.py
    names = {**{byte: chr(byte) for byte in kept}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    ranks = {get_tokenizer().decode_single_token_bytes(rank): rank for rank in range(EOT)}
    text = {token: "".join(names[byte] for byte in token) for token in ranks}
    merges = [" ".join(text[part] for part in split(token, ranks)) for token in ranks if len(token) > 1]
    return {**{text[token]: rank for token, rank in ranks.items()}, "<|endoftext|>": EOT}, merges
