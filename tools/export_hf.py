"""
Export a checkpoint to a folder in Hugging Face's layout, which transformers, llama.cpp and the hub read.

    python -m tools.export_hf log/model_19073.pt my_gpt2
    python -m tools.export_hf log my_gpt2                   # the newest checkpoint in log/

The folder has OpenAI's 50257 tokens, without the padding rows of the vocabulary, and can be used like a checkpoint, as
in --init_from my_gpt2. If transformers is installed, its logits must equal this code's, or no folder is written.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))  # python tools/export_hf.py works, too
import train_gpt2
from lib.checkpoint import load_checkpoint, newest_checkpoint
from lib.console import UserError, run_as_command, say
from lib.files import expand, list_folder
from lib.model.hugging_face import CONFIG, FIXED
from lib.model.load import check_usable, rebuild, script_of
from lib.run.code import short
from lib.tokenizer import EOT, VOCAB_SIZE, get_tokenizer

LAYERS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")  # of a block
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # the default in transformers is 0.1, in training
TOLERANCE = 1e-3  # of logits in float32; GPT-2's are around 100 in size

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2]
---

# GPT-2, {parameters:.0f}M parameters

A GPT-2 of {n_layer} layers, {n_head} heads and {n_embd} channels, with a context of {block_size} tokens. It continues
text; it was not taught to answer or to be harmless.

| | |
|---|---|
{facts}
"""


def to_theirs(model):
    """(config, weights) of a model in Hugging Face's layout, without the padding rows of the vocabulary and without the
    head, which is the embedding. Raises UserError if the weights are not those of a GPT-2."""
    config, weights = asdict(model.config), model.state_dict()
    layers = ["ln_f", *(f"h.{i}.{layer}" for i in range(config["n_layer"]) for layer in LAYERS)]
    expected = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    expected |= {f"transformer.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    if strange := sorted(weights.keys() ^ expected):
        raise UserError(f"the model is no longer GPT-2: additional or missing weights, {', '.join(strange[:3])}")
    if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise UserError("the model is no longer GPT-2: its head, lm_head.weight, differs from its embedding")
    theirs = {their: config[our] for our, their in CONFIG.items()}
    theirs |= {"vocab_size": VOCAB_SIZE, "bos_token_id": EOT, "eos_token_id": EOT, **FIXED, **DROPOUT}
    theirs |= {"architectures": ["GPT2LMHeadModel"], "dtype": "float32", "n_ctx": theirs["n_positions"]}  # of llama.cpp
    weights = train_gpt2.GPT.from_openai(weights)  # transposing is its own inverse
    weights["transformer.wte.weight"] = weights.pop("lm_head.weight")[:VOCAB_SIZE]
    return theirs, {name: weight.contiguous() for name, weight in weights.items()}


def two_parts(token, ranks):
    """The two tokens that were merged into this one (bytes), found by applying the merges of lower ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, EOT) for a, b in zip(parts, parts[1:], strict=False)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def write_tokenizer(folder, context):
    """OpenAI's vocab.json and merges.txt, byte for byte, and the settings with which transformers reads them. Their
    texts have a printable character for each byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]  # get printable names, too, as in OpenAI's encoder.py
    names = {**{byte: chr(byte) for byte in kept}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    ranks = {get_tokenizer().decode_single_token_bytes(rank): rank for rank in range(EOT)}
    texts = {token: "".join(names[byte] for byte in token) for token in ranks}
    vocab = {**{texts[token]: rank for token, rank in ranks.items()}, "<|endoftext|>": EOT}
    merges = [" ".join(texts[part] for part in two_parts(token, ranks)) for token in ranks if len(token) > 1]
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": context, "add_prefix_space": False}
    settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8", newline="\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


@torch.no_grad()
def compare_logits(folder, model, doubt):
    """Raise UserError if the logits of transformers from the folder differ from this code's from the model. Returns the
    result as text; doubt: why this code may not be the one that trained the model, or ""."""
    try:
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging
    except ImportError:
        if odd := asdict(model.config).keys() - CONFIG.keys():
            raise UserError(f"to check that a model with {', '.join(odd)} is GPT-2, pip install transformers") from None
        return "not compared with transformers, which is not installed: make sure that the model is still GPT-2"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    T = model.config.block_size  # all positions: a change of the model may affect only the far ones
    idx = torch.randint(EOT + 1, (1, T), generator=torch.Generator().manual_seed(0))
    ours, theirs = model.eval()(idx)[0][..., : EOT + 1], theirs(idx).logits
    difference = (ours - theirs).abs().max().item()
    if not difference <= TOLERANCE:  # also rejects NaN
        found = f"transformers' logits from the export differ from this code's by up to {difference:.3g}"
        raise UserError(f"{found}, more than {TOLERANCE}: the model is no longer GPT-2, as which it would be exported")
    if doubt:
        return f"not certified: {doubt}"
    return f"compared with transformers: the same logits on {T:,} tokens, within {difference:.1e}"


def write_folder(folder, model, facts, doubt=""):
    """Write the folder of a model, a GPT; facts: rows of its README.md, by what they say. The files appear complete,
    config.json last, or not at all. The folder may be a mount, which cannot be replaced."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config, weights = to_theirs(model)
    unfinished = folder / "unfinished"
    try:
        unfinished.mkdir(parents=True)
        (unfinished / "config.json").write_text(json.dumps(config, indent=2))
        write_tokenizer(unfinished, config["n_positions"])
        save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(unfinished / "config.json", unfinished / "model.safetensors")  # which save_file makes private
        facts = {**facts, "export": compare_logits(unfinished, model, doubt)}
        parameters = sum(weight.numel() for weight in weights.values()) / 1e6
        rows = "\n".join(f"| {what} | {value} |" for what, value in facts.items())
        card = CARD.format(**asdict(model.config), parameters=parameters, facts=rows)
        (unfinished / "README.md").write_text(card, encoding="utf-8", newline="\n")
        for file in sorted(unfinished.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}. Fix that, or name another folder") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is empty
    say(facts["export"])
    say(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


def new_folder(name):
    """The path of a folder to create. Raises UserError if it exists and is not empty."""
    folder = Path(os.path.realpath(expand(name)))
    if os.path.exists(folder) and (not folder.is_dir() or list_folder(folder)):
        raise UserError(f"{folder} exists already and is not empty: name a new folder, or delete it")
    return folder


def facts_of(checkpoint):
    """What the model's card says of how it was trained, by what it is."""
    train = checkpoint["train_config"]
    step = checkpoint["step"]
    tokens = checkpoint.get("tokens", step * train.get("total_batch_size", 0))
    facts = {"training": f"{step:,} steps, {tokens:,} tokens, from {train.get('init_from', 'scratch')}"}
    facts["data"] = train.get("data_dir", "unknown")
    if checkpoint.get("val_loss") is not None:
        facts["validation loss"] = f"{checkpoint['val_loss']:.4f} nats per token"
    facts["code"] = checkpoint.get("script", ["train_gpt2.py"])[0]
    if "commit" in checkpoint:
        facts["code"] += f" at commit {short(checkpoint['commit'])}"
    return facts


def export(path, folder):
    path = newest_checkpoint(expand(path))
    folder = new_folder(folder)
    checkpoint = load_checkpoint(path, mmap=True)
    script, doubt = script_of(checkpoint)
    if doubt and not script:
        raise UserError(f"cannot export {path}: {doubt}")
    script = script or train_gpt2
    model = rebuild(checkpoint, script.GPT, script.GPTConfig)
    check_usable(path, model)
    write_folder(folder, model, facts_of(checkpoint), doubt)


def main():
    parser = argparse.ArgumentParser(description="Export a checkpoint for transformers", allow_abbrev=False)
    parser.add_argument("checkpoint", help="a checkpoint of train_gpt2.py, or a log_dir")
    parser.add_argument("folder", help="the folder to create; it may exist if it is empty")
    run_as_command(export, *vars(parser.parse_args()).values())


if __name__ == "__main__":
    main()
