"""Train on a CUDA GPU of which only 8 GB may be used."""

import torch

import train_gpt2
from lib.device import claim_gpu

claim_gpu(0)  # first: it configures the allocator
torch.cuda.set_per_process_memory_fraction(8e9 / torch.cuda.get_device_properties(0).total_memory)
train_gpt2.main(train_gpt2.parse_args())
