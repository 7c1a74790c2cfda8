"""
Export a checkpoint to a folder in Hugging Face's layout, which transformers, llama.cpp and the hub read.

    python -m tools.export_hf log/model_19073.pt my_gpt2
    python -m tools.export_hf log my_gpt2                   # the newest checkpoint in log/

The folder has OpenAI's 50257 tokens, without the padding rows of the vocabulary, and can be used like a checkpoint:
--init_from my_gpt2, python hellaswag.py -m my_gpt2, python -m tools.sample my_gpt2. If transformers is installed, its
logits must equal this code's, or no folder is written.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))  # python tools/export_hf.py works, too
from lib.checkpoint import load_checkpoint, newest_checkpoint
from lib.console import UserError, run_as_command, say
from lib.data.manifest import read_manifest
from lib.files import expand, list_folder
from lib.model.hugging_face import CONFIG, FIXED, transposed, vocabulary
from lib.model.load import check_finite, check_vocabulary, rebuild
from lib.tokenizer import EOT, VOCAB_SIZE, get_tokenizer
from train_gpt2 import GPT, GPTConfig

LAYERS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")  # of a block
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # the default in transformers is 0.1, in training
TOLERANCE = 1e-3  # of logits in float32; GPT-2's are around 100 in size

CARD = """---
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2]{datasets}
---

# GPT-2, {parameters:.0f}M parameters

A GPT-2 of {n_layer} layers, {n_head} heads and {n_embd} channels, with a context of {block_size} tokens,
{origin}.

{facts}

It continues text; it was not taught to answer or to be harmless.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(FOLDER), AutoModelForCausalLM.from_pretrained(FOLDER)
ids = tokenizer("The water", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50, do_sample=True, top_k=50)[0]))
```
"""


def to_theirs(config, weights):
    """Our config and weights (dicts) as theirs, without the padding rows of the vocabulary and without the head, which
    is the embedding. Raises UserError if the weights are not those of a GPT-2."""
    layers = ["ln_f", *(f"h.{i}.{layer}" for i in range(config["n_layer"]) for layer in LAYERS)]
    expected = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    expected |= {f"transformer.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    if strange := sorted(weights.keys() ^ expected):
        raise UserError(f"the model is no longer GPT-2: additional or missing weights, {', '.join(strange[:3])}")
    if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise UserError("the model is no longer GPT-2: its head, lm_head.weight, differs from its embedding")
    theirs = {their: config[our] for our, their in CONFIG.items()}
    theirs |= {"vocab_size": VOCAB_SIZE, "bos_token_id": EOT, "eos_token_id": EOT, **FIXED, **DROPOUT}
    theirs |= {"architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    theirs["n_ctx"] = theirs["n_positions"]  # its old name, which llama.cpp reads
    weights = {name: transposed(name, weight) for name, weight in weights.items() if name != "lm_head.weight"}
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:VOCAB_SIZE]
    return theirs, {name: weight.contiguous() for name, weight in weights.items()}


def two_parts(token, ranks):
    """The two tokens that were merged into this one (bytes), found by applying the merges of lower ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, EOT) for a, b in zip(parts, parts[1:], strict=False)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def merges_of(vocab):
    """The merges of OpenAI's merges.txt, in their order."""
    tokens = {get_tokenizer().decode_single_token_bytes(rank): rank for rank in range(EOT)}
    texts = dict(zip(tokens, vocab, strict=False))
    return [" ".join(texts[part] for part in two_parts(token, tokens)) for token in tokens if len(token) > 1]


def write_tokenizer(folder, context):
    """OpenAI's vocab.json and merges.txt, byte for byte, and tokenizer.json, which newer programs read."""
    vocab = vocabulary()
    merges = merges_of(vocab)
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": EOT, "content": "<|endoftext|>", "special": True, "normalized": False}
    end |= {"single_word": False, "lstrip": False, "rstrip": False}
    bpe = {"type": "BPE", "vocab": vocab, "merges": merges}
    whole = {"version": "1.0", "added_tokens": [end], "pre_tokenizer": by_bytes, "decoder": by_bytes, "model": bpe}
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": context, "add_prefix_space": False, **special}
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8", newline="\n")
    write_json(folder / "tokenizer.json", whole)
    write_json(folder / "tokenizer_config.json", {**settings, "clean_up_tokenization_spaces": False}, indent=2)


def write_json(path, contents, indent=None):
    path.write_text(json.dumps(contents, indent=indent))


def model_card(checkpoint, path, parameters):
    """README.md: how the model was trained, from the checkpoint, its log and the manifest of its data."""
    train, step, datasets = checkpoint["train_config"], checkpoint["step"], ""
    folder = Path(train.get("data_dir", "unknown"))
    manifest = (read_manifest(folder) if os.path.isdir(folder) else None) or {}
    data = [manifest.get("source") or train.get("data_source") or str(folder)]
    if manifest.get("asked_revision"):  # only data sets of the hub have one
        datasets = f"\ndatasets: [{data[0]}]"
        data.append(f"at revision {manifest['revision']}")
    begin, tokens = train.get("init_from", "resume"), step * train.get("total_batch_size", 0)
    origin = "" if begin == "resume" else f", from {begin}"  # a resumed run does not know how it began
    facts = {"data": " ".join(data), "training": f"{step:,} steps, {tokens:,} tokens{origin}"}
    log = path.parent / "log.txt"
    records = re.findall(r"^(\d+) (train|val|hella) (\S+)$", log.read_text() if log.is_file() else "", re.M)
    last = {kind: value for at, kind, value in records if int(at) == (step - 1 if kind == "train" else step)}
    if checkpoint.get("val_loss") is not None:
        last.setdefault("val", f"{checkpoint['val_loss']:.4f}")
    names = {"train": "last training loss, nats per token", "val": "validation loss, nats per token"}
    names["hella"] = "HellaSwag acc_norm, completion style"
    facts |= {names[kind]: last[kind] for kind in names if kind in last}
    commit, _, edited = (checkpoint.get("commit") or "").partition("+")  # "+changes": uncommitted ones
    origin = "trained with train_gpt2.py" + f" at commit {commit}" * bool(commit)
    origin += " with uncommitted changes" * bool(edited)
    return render_card(checkpoint["config"], parameters, origin, facts, datasets)


def render_card(config, parameters, origin, facts, datasets=""):
    rows = "\n".join(f"| {what} | {value} |" for what, value in facts.items())
    about = {"parameters": parameters / 1e6, "origin": origin, "datasets": datasets}
    return CARD.format(**config, **about, facts=f"| | |\n|---|---|\n{rows}")


@torch.no_grad()
def compare_logits(folder, model):
    """Raise UserError if the logits of transformers from the folder differ from this code's from the model."""
    try:
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging
    except (ImportError, RuntimeError):
        settings = {field.name: (getattr(model.config, field.name), field.default) for field in fields(model.config)}
        if odd := [f"{name}={v!r}" for name, (v, default) in settings.items() if name not in CONFIG and v != default]:
            raise UserError(
                f"the model has {', '.join(odd)}, which Hugging Face's layout cannot express. To check whether the "
                "model computes the same without, install transformers: pip install transformers"
            ) from None
        say("not compared with transformers, which is not installed: make sure that the model is still GPT-2")
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    T = model.config.block_size  # all positions: a change of the model may affect only the far ones
    idx = torch.randint(EOT + 1, (1, T), generator=torch.Generator().manual_seed(0))
    ours, theirs = model.eval()(idx)[0][..., : EOT + 1], theirs(idx).logits
    difference = (ours - theirs).abs().max().item()
    if not difference <= TOLERANCE:  # also rejects NaN
        raise UserError(
            f"transformers' logits from the export differ from this code's by up to {difference:.3g}; {TOLERANCE} is "
            "allowed. Hugging Face's layout cannot express how the model was changed: share the "
            "checkpoint and its code"
        )
    say(f"compared with transformers: the same logits on {T:,} tokens, within {difference:.1e}")


def write_folder(folder, model, card):
    """Write the folder of a model, a GPT; card: a function of the number of parameters that returns its README.md.

    The files appear complete, config.json last, or not at all. The folder may be a mount, which cannot be replaced.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config, weights = to_theirs(asdict(model.config), model.state_dict())
    unfinished = folder / "unfinished"
    try:
        unfinished.mkdir(parents=True)
        write_json(unfinished / "config.json", config, indent=2)
        write_json(unfinished / "generation_config.json", {"bos_token_id": EOT, "eos_token_id": EOT}, indent=2)
        write_tokenizer(unfinished, config["n_positions"])
        save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(unfinished / "config.json", unfinished / "model.safetensors")  # which save_file makes private
        text = card(sum(weight.numel() for weight in weights.values()))
        (unfinished / "README.md").write_text(text, encoding="utf-8", newline="\n")
        compare_logits(unfinished, model)
        for file in sorted(unfinished.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}. Fix that, or name another folder") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is empty
    say(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


def new_folder(name):
    """The path of a folder to create. Raises UserError if it exists and is not empty."""
    folder = Path(os.path.realpath(expand(name)))
    if os.path.exists(folder) and (not folder.is_dir() or list_folder(folder)):
        raise UserError(f"{folder} exists already and is not empty: name a new folder, or delete it")
    return folder


def export(path, folder):
    path = Path(newest_checkpoint(expand(path)))
    folder = new_folder(folder)
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder without checkpoints: give a checkpoint, or a log_dir with one")
    checkpoint = load_checkpoint(path, mmap=True)
    model = rebuild(checkpoint, GPT, GPTConfig)
    check_vocabulary(path, model.config)
    check_finite(path, model)
    write_folder(folder, model, lambda parameters: model_card(checkpoint, path, parameters))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="a checkpoint of train_gpt2.py, or a log_dir")
    parser.add_argument("folder", help="the folder to create; it may exist if it is empty")
    args = parser.parse_args()
    run_as_command(export, args.checkpoint, args.folder)


if __name__ == "__main__":
    main()
