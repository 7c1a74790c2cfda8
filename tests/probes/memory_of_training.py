"""Train, and print the GPU memory that it took, also if it fails."""

import torch

import train_gpt2
from lib.console import run_as_command, say


def train():
    try:
        train_gpt2.main(train_gpt2.parse_args())
    finally:
        if torch.cuda.is_initialized():
            live, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
            total = torch.cuda.get_device_properties(0).total_memory / 2**30
            say(f"memory | {live:.1f} GiB live at most, {reserved:.1f} reserved, of {total:.1f}")


run_as_command(train)
