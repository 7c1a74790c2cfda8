"""Train, and print in each step how many bytes of gradients lie outside of DDP's buckets, and how many stay there."""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import train_gpt2

buckets, clip, train_step = set(), torch.nn.utils.clip_grad_norm_, train_gpt2.train_step


def note(state, bucket):
    buckets.add(bucket.buffer().untyped_storage().data_ptr())
    return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])


class Probe(DistributedDataParallel):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, note)


def outside(gradients):
    return [g for g in gradients if g.untyped_storage().data_ptr() not in buckets]


def measured(model, *args):
    def look(parameters, *rest):
        parameters = list(parameters)
        look.bytes = sum(g.nbytes for g in outside([p.grad for p in parameters]))
        return clip(parameters, *rest)

    buckets.clear()
    torch.nn.utils.clip_grad_norm_ = look
    result = train_step(model, *args)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    kept, total = len(gradients) - len(outside(gradients)), len(list(model.parameters()))
    os.write(1, f"outside {look.bytes} bytes, kept {kept} of {total}\n".encode())
    return result


train_gpt2.DistributedDataParallel = Probe
train_gpt2.train_step = measured
train_gpt2.run_as_command(train_gpt2.main, train_gpt2.parse_args())
