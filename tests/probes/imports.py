"""Import the three scripts, and check that nothing is opened, connected or loaded that is not needed."""

import os
import sys

sys.dont_write_bytecode = True
import numpy  # noqa: E402, F401
import torch.distributed  # noqa: E402

touched, before = [], set(sys.modules)


def watch(event, args):
    if event == "socket.connect" or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")):
        touched.append(args)


sys.addaudithook(watch)
import fineweb  # noqa: E402, F401
import hellaswag  # noqa: E402, F401
import train_gpt2  # noqa: E402, F401

assert not touched, touched
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
heavy = {"datasets", "huggingface_hub", "transformers", "tiktoken", "tqdm", "pyarrow", "matplotlib"}
assert not heavy & (set(sys.modules) - before), heavy & set(sys.modules)
assert os.listdir() == []
