"""Train; rank 1 raises an error in step 3, while rank 0 waits for it."""

import os

import train_gpt2
from lib.console import UserError

original = train_gpt2.get_lr


def get_lr(step, config):
    if os.environ["RANK"] == "1" and step == 3:
        raise UserError("rank 1 says why")
    return original(step, config)


train_gpt2.get_lr = get_lr
train_gpt2.run_as_command(train_gpt2.main, train_gpt2.parse_args())
