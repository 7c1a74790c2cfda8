"""Train; rank 1 kills itself in step 27 of torchrun's first attempt. In the end a thread of torch is at work there, as
one of gloo's can be: with Python's own way out, "terminate called without an active exception" would end it."""

import os
import signal
import threading

import torch

import train_gpt2

original = train_gpt2.get_lr


def get_lr(step, config):
    if os.environ["RANK"] == "1" and step == 27 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(step, config)


def work():
    while True:
        torch.ones(50, 50) @ torch.ones(50, 50)


train_gpt2.get_lr = get_lr
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
    threading.Thread(target=work, daemon=True).start()
train_gpt2.run_as_command(train_gpt2.main, train_gpt2.parse_args())
