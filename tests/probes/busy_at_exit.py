"""Train; on rank 1 a thread of torch is at work to the end and beyond, as those of gloo may be."""

import os
import threading

import torch

import train_gpt2


def work():
    while True:
        torch.ones(50, 50) @ torch.ones(50, 50)


if os.environ["RANK"] == "1":
    threading.Thread(target=work, daemon=True).start()
train_gpt2.run_as_command(train_gpt2.main, train_gpt2.parse_args())
