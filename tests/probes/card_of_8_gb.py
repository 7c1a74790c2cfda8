"""Train on a CUDA GPU of which only 8 GB may be used."""

import torch

import train_gpt2

torch.cuda.set_per_process_memory_fraction(8e9 / torch.cuda.get_device_properties(0).total_memory)
train_gpt2.main(train_gpt2.parse_args())
