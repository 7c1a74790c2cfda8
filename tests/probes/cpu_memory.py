"""Print by how much a rehearsal on the CPU makes this process grow at most, and what was expected, in bytes."""

import contextlib
import re
from pathlib import Path

import torch

from lib.model import memory
from lib.model.cpu_loss import chunked_cross_entropy
from train_gpt2 import GPT, GPTConfig


def status(name):
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


model = GPT(GPTConfig(256, 8192, 3, 4, 256))
model.fast_loss = chunked_cross_entropy
optimizer = model.configure_optimizers(0.1, 1e-3, "cpu")
memory.make_moments(optimizer)
B, before = 24, status("VmRSS")
memory.rehearse(model, optimizer, B, 256, 8192, torch.device("cpu"), contextlib.nullcontext)
print(status("VmHWM") - before, memory.cpu_bytes(model, B * 256, False, False))
