"""Print by how much a rehearsal on the CPU makes this process grow at most, and what was expected, in bytes."""

import contextlib
import re
from pathlib import Path

from lib.model import rehearsal
from lib.model.cpu_loss import chunked_cross_entropy
from train_gpt2 import GPT, GPTConfig


def status(name):
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


model = GPT(GPTConfig(256, 8192, 3, 4, 256))
model.fast_loss = chunked_cross_entropy
optimizer = model.configure_optimizers(0.1, 1e-3, "cpu")
rehearsal.make_moments(optimizer)
B, before = 24, status("VmRSS")
rehearsal.try_step(model, optimizer, B, 256, contextlib.nullcontext)
print(status("VmHWM") - before, rehearsal.cpu_bytes(model, B * 256, False, False))
