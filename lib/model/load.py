"""
A model from what was saved of one, or a message that says what does not fit.
"""

import contextlib
from dataclasses import fields
from unittest import mock

import torch

from lib.console import UserError
from lib.tokenizer import EOT


def no_random_weights():
    """Modules made within have what is in memory as their weights, which a checkpoint's then replace. That saves a
    second of random numbers for 124M, and another on the meta device, where the first one imports torch's compiler."""

    def leave(tensor, *args, **kwargs):
        return tensor

    return mock.patch.multiple(torch.Tensor, normal_=leave, uniform_=leave)


def rebuild(checkpoint, model_class, config_class):
    """The model of a checkpoint, on the CPU. Raises UserError where its weights are not those of its config, or the
    config is not one of this code."""
    config, weights = checkpoint["config"], checkpoint["model"]
    names = sorted(field.name for field in fields(config_class))
    if sorted(config) != names or not all(isinstance(value, int) and value > 0 for value in config.values()):
        raise UserError(f"the checkpoint's model has the config {config}: this code needs whole numbers for {names}")
    found = {name: tuple(getattr(weight, "shape", ())) for name, weight in weights.items()}
    expected = {}
    if config["n_layer"] <= len(weights) and config["n_embd"] % config["n_head"] == 0:
        # shapes alone: a wrong config can ask for any amount of memory, and for more than there are addresses
        with torch.device("meta"), no_random_weights(), contextlib.suppress(RuntimeError, TypeError):
            expected = {name: tuple(p.shape) for name, p in model_class(config_class(**config)).state_dict().items()}
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            raise UserError(
                f"the checkpoint's model does not fit its config {config}: {name} has the shape {found.get(name)}, "
                f"not {expected.get(name)}"
            )
    with no_random_weights():
        model = model_class(config_class(**config))
    model.load_state_dict(weights)
    return model


def check_vocabulary(name, config):
    """Raise UserError where a model of this config does not know every token of GPT-2."""
    if config.vocab_size <= EOT:
        raise UserError(f"{name} knows {config.vocab_size} ids, fewer than the 50257 tokens of GPT-2, which this takes")
