"""In a copy of the scripts with train_relu.py, which has another activation: two steps with each script, and what the
tools then do with their checkpoints. The arguments are flags of a run."""

import contextlib
import io
import os
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())  # the copy

import torch
import train_relu

import train_gpt2
from lib.console import UserError
from tools.export_hf import export
from tools.sample import model_to_sample


def output_of(function, *args):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        result = function(*args)
    return result, out.getvalue()


def expect_refusal(words, *args):
    try:
        export(*args)
    except UserError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {args}")


x = torch.randn(3, 16)
for script, activation in ((train_gpt2, "gelu"), (train_relu, "relu")):
    script.main(script.parse_args([*sys.argv[1:], f"--log_dir={activation}"]))
    model, warnings = output_of(model_to_sample, activation, "cpu")
    mlp = model.transformer.h[0].mlp
    assert type(model) is script.GPT and warnings == "", warnings
    assert torch.equal(mlp(x), script.MLP.forward(mlp, x))

assert "compared with transformers: the same logits" in output_of(export, "gelu", "exported")[1]
expect_refusal("transformers' logits from the export differ from this code's", "relu", "out")

with open("train_gpt2.py", "a") as file:
    file.write("# a change\n")
for where in (output_of(export, "gelu", "again")[1], Path("again/README.md").read_text()):
    assert "not certified: train_gpt2.py has changed since it trained this" in where and "the same logits" not in where

Path("train_relu.py").unlink()
expect_refusal("train_relu.py, which trained this, is not in", "relu", "out")
model, warnings = output_of(model_to_sample, "relu", "cpu")
assert type(model) is train_gpt2.GPT and "warning: train_relu.py, which trained this, is not in" in warnings
assert not Path("out").exists()
