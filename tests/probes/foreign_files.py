"""Writes into a folder the files that other programs save of one GPT-2, with classes of the same names as theirs.

python foreign_files.py FOLDER
"""

import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from support import ROOT  # noqa: F401 - the scripts can be imported then

import train_gpt2

T, V, L, HEADS, C = 16, 50304, 2, 4, 16
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@dataclass
class GPTConfig:
    block_size: int = T
    vocab_size: int = V
    n_layer: int = L
    n_head: int = HEADS
    n_embd: int = C


class GPT(torch.nn.Linear):
    pass


def model(bias=True):
    """Weights far from the initialization, so that a wrong order or a wrong n_head shows."""
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(T, V, L, HEADS, C)).eval()
    for name, p in model.named_parameters():
        p.data += 0.3 * torch.randn_like(p)
        p.data *= bias or not name.endswith("bias")
    return model


def with_masks(weights):
    mask = torch.ones(T, T).tril().view(1, 1, T, T)
    return {**weights, **{f"transformer.h.{i}.attn.bias": mask for i in range(L)}}


def prefixed(prefix, weights):
    return {prefix + name: weight for name, weight in weights.items()}


def main(folder):
    folder = Path(folder)
    weights = {name: weight.clone() for name, weight in model().state_dict().items()}
    without = {n: w for n, w in model(bias=False).state_dict().items() if not n.endswith("bias")}
    hugging_face = {
        n.removeprefix("transformer."): (w.t() if n.endswith(CONV1D) else w).contiguous() for n, w in weights.items()
    }
    headless = {name: weight for name, weight in hugging_face.items() if name != "lm_head.weight"}
    args = dict(n_layer=L, n_head=HEADS, n_embd=C, block_size=T, bias=True, vocab_size=V, dropout=0.1)
    knobs = {"out_dir": "out", "learning_rate": 6e-4, "compile": True, **args}
    nano = {"optimizer": {"state": {}}, "iter_num": 250, "best_val_loss": torch.tensor(3.25), "config": knobs}

    def save(name, contents, **options):
        torch.save(contents, folder / name, **options)

    # those that are GPT-2
    save("tutorial.pt", {"model": with_masks(weights), "config": GPTConfig(), "step": 250, "val_loss": 3.25})
    compiled = prefixed("_orig_mod.", with_masks(weights))
    save("nanogpt.pt", {"model": compiled, "model_args": args, **nano})
    save(
        "nanogpt_no_bias.pt", {"model": prefixed("_orig_mod.", without), "model_args": {**args, "bias": False}, **nano}
    )
    save("ddp.pt", {"state_dict": prefixed("module._orig_mod.", weights), "config": {"n_head": HEADS}})
    save("bare.pt", weights)
    save("legacy.pt", {**weights}, _use_new_zipfile_serialization=False)
    save("half.pt", {name: weight.half() for name, weight in weights.items()})
    save("hugging_face.pt", headless)
    save_file(hugging_face, folder / "hugging_face.safetensors")
    save_file(headless, folder / "headless.safetensors")

    # those that are not, or not known to be
    save("whole.pt", {"model": GPT(2, 2), "config": GPTConfig()})
    untied = {**weights, "lm_head.weight": weights["lm_head.weight"] + 0.1}
    save("untied.pt", {"model": untied, "config": GPTConfig()})
    for name, field in (("relu", {"activation": "relu"}), ("relu_flag", {"use_relu": True})):
        config = GPTConfig()
        vars(config).update(field)
        save(f"{name}.pt", {"model": weights, "config": config})
        save(f"{name}_dict.pt", {"model": weights, "config": vars(config)})
    save("contradiction.pt", {"model": weights, "config": GPTConfig(n_layer=3)})
    save("odd_heads.pt", {"model": weights, "config": GPTConfig(n_head=3)})
    save("rotary.pt", {"model": {n: w for n, w in weights.items() if "wpe" not in n}, "config": GPTConfig()})
    save("extra.pt", {"model": {**weights, "transformer.h.0.ln_3.weight": torch.ones(C)}, "config": GPTConfig()})
    some = {n: w for n, w in weights.items() if n != "transformer.h.1.ln_1.bias"}
    save("lost_bias.pt", {"model": some, "config": GPTConfig()})
    letters = {n: w[:65] if len(w) == V else w for n, w in weights.items()}
    save("letters.pt", {"model": letters, "model_args": {**args, "vocab_size": 65}})
    save("other.pt", {"model": {"weight": torch.ones(2)}})
    save("list.pt", [1, 2])
    save("mixed.pt", {**weights, "step": 250})
    with zipfile.ZipFile(folder / "zip.pt", "w") as file:
        file.writestr("a", "b")
    (folder / "cut.pt").write_bytes((folder / "tutorial.pt").read_bytes()[:-1000])
    (folder / "cut.safetensors").write_bytes((folder / "headless.safetensors").read_bytes()[:-1000])
    (folder / "text.pt").write_text("no weights at all")
    (folder / "empty.pt").write_bytes(b"")
    for name in ("weights.gguf", "model.safetensors.index.json"):
        (folder / name).write_bytes(b"{}")
    weights["transformer.h.1.mlp.c_fc.bias"][3] = float("nan")
    save("diverged.pt", {"model": weights, "config": GPTConfig()})


if __name__ == "__main__":
    main(sys.argv[1])
