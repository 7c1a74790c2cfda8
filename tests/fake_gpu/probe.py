"""train_gpt2.py with stand-ins for the numbers that the host reads back and a GPU that computes nothing cannot give.

A line for each step says what it launched, copied, waited for and took of memory. DIES: rank 1 kills itself once.
"""

import ctypes
import os
import signal
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

import hellaswag
import train_gpt2
from lib.console import run_as_command, say

hellaswag.SHA256, hellaswag.FOLDER = {}, Path(os.environ["HELLASWAG_FOLDER"])
tolist, score, train_step, steps = torch.Tensor.tolist, hellaswag.score, train_gpt2.train_step, []


def tolist_of_something(self):
    """A count that is 0, at the end of a sum, becomes 1, and an id that is no token becomes 0."""
    values = tolist(self)
    if self.is_cuda and self.is_floating_point() and self.shape in ((2,), (3,)):
        values[-1] = values[-1] or 1.0
    if self.is_cuda and self.dtype == torch.long and self.dim() == 2:
        values = [[token if 0 <= token < 50257 else 0 for token in row] for row in values]
    return values


class CountedMasks(TorchFunctionMode):
    """How many elements a mask picks is counted on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool:
            tensor, mask = args
            return tensor[tuple(places.to(tensor.device) for places in mask.cpu().nonzero(as_tuple=True))]
        return function(*args, **(kwargs or {}))


def counted_score(*args):
    with CountedMasks():
        return score(*args)


def counts():
    out = (ctypes.c_long * 9)()
    ctypes.CDLL(None).fake_stats(out)
    return dict(zip(("launches", "products", "h2d", "d2h", "syncs"), out, strict=False))


def counted_step(*args):
    before = counts()
    torch.cuda.reset_peak_memory_stats()
    result = train_step(*args)
    line = ", ".join(
        f"{now - then} {name}" for (name, now), then in zip(counts().items(), before.values(), strict=True)
    )
    gib = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.host_memory_stats()["allocated_bytes.current"] / 2**30
    say(f"train_step | {line}; at most {gib[0]:.3f} GiB, {gib[1]:.3f} GiB pinned")
    steps.append(line)
    dies = "DIES" in os.environ and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if dies and len(steps) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return result


torch.Tensor.tolist = tolist_of_something
hellaswag.score, train_gpt2.train_step = counted_score, counted_step
run_as_command(train_gpt2.main, train_gpt2.parse_args())
