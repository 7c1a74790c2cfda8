"""Train; rank 1 kills itself in step 27 of torchrun's first attempt."""

import os
import signal

import train_gpt2

original = train_gpt2.get_lr


def get_lr(step, config):
    if os.environ["RANK"] == "1" and step == 27 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(step, config)


train_gpt2.get_lr = get_lr
train_gpt2.run_as_command(train_gpt2.main, train_gpt2.parse_args())
