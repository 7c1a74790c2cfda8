"""The logits of OpenAI's gpt2, as the hub's client has it, for the token ids in one file, into another."""

import sys

sys.modules["transformers"] = None  # as where it is not installed

import torch  # noqa: E402

from train_gpt2 import GPT  # noqa: E402

idx, out = sys.argv[1:]
torch.save(GPT.from_pretrained("gpt2").eval()(torch.load(idx))[0], out)
