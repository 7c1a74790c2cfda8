"""
GPT-2 in Hugging Face's layout: the names and shapes of its config and its weights, and ours.
"""

import json
from pathlib import Path

from lib.common import EOT, InputError

CONFIG = {"block_size": "n_positions", **{name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}}
FIXED = {  # what our code computes; these are also the defaults of a config.json that does not say
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True,
}  # fmt: skip
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # their default of 0.1 is on in training


def transposed(name, weight):
    """OpenAI's linear layers were 1x1 convolutions, with weights (in, out) where nn.Linear has (out, in)."""
    return weight.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else weight


def to_theirs(config, weights):
    """Our config and weights (dicts) as theirs, without the rows that pad the vocabulary. The head is not among the
    weights: it is the embedding."""
    theirs = {their: config[our] for our, their in CONFIG.items()}
    theirs |= {"vocab_size": EOT + 1, "bos_token_id": EOT, "eos_token_id": EOT, **FIXED, **DROPOUT}
    theirs |= {"architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    theirs["n_ctx"] = theirs["n_positions"]  # its former name, which llama.cpp reads
    weights = {name: transposed(name, weight) for name, weight in weights.items() if name != "lm_head.weight"}
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: EOT + 1]
    return theirs, {name: weight.contiguous() for name, weight in weights.items()}


def to_ours(config, weights):
    """Their config and weights (dicts) as lib.restore.rebuild takes them. Raises InputError for another model."""
    other = [f"{name} {config[name]}, not {value}" for name, value in FIXED.items() if config.get(name, value) != value]
    if missing := [name for name in CONFIG.values() if name not in config]:
        other += [f"no {', '.join(missing)}"]
    if other:
        raise InputError(f"its config is not that of a GPT-2 that this code computes: it has {'; '.join(other)}")
    ours = {}
    for name, weight in weights.items():
        name = name if name == "lm_head.weight" else "transformer." + name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, in files of former versions
            ours[name] = transposed(name, weight).float()
    ours["lm_head.weight"] = ours.get("transformer.wte.weight")
    return {"config": {our: config[their] for our, their in CONFIG.items()}, "model": ours}


def read_folder(folder):
    """A folder with config.json and model.safetensors, as lib.restore.rebuild takes it, or InputError."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"to read {folder}/ takes pip install safetensors") from None
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return to_ours(config, load_file(Path(folder) / "model.safetensors"))
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise InputError(f"cannot load {folder}/ as a GPT-2 of config.json and model.safetensors: {error}") from None
