"""Train, and check in every step that the gradients are summed over the ranks once and are equal on both."""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import train_gpt2

syncs, clip, train_step = [], torch.nn.utils.clip_grad_norm_, train_gpt2.train_step


def count(state, bucket):  # the communication hook runs once a bucket and synchronization
    if syncs:  # not before the first step
        syncs[-1] += bucket.is_last()
    return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])


class Probe(DistributedDataParallel):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, count)


def check(parameters, *args, **kwargs):
    parameters = list(parameters)
    for p in parameters:
        both = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(both, p.grad.contiguous())
        assert torch.equal(*both)
    assert syncs[-1] == 1, syncs
    return clip(parameters, *args, **kwargs)


def counted(*args):
    syncs.append(0)
    return train_step(*args)


def main(config):
    train_gpt2.main(config)
    assert len(syncs) == 20
    os.write(1, f"group left {not dist.is_initialized()}, steps checked {len(syncs)}\n".encode())  # one write a rank


train_gpt2.DistributedDataParallel = Probe
torch.nn.utils.clip_grad_norm_ = check
train_gpt2.train_step = counted
train_gpt2.run_as_command(main, train_gpt2.parse_args())
