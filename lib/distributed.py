"""
The ranks of torchrun; alone, without it, there is one.
"""

import contextlib
import hashlib
import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

from lib.console import UserError
from lib.device import claim_gpu


@contextlib.contextmanager
def distributed(device, timeout):
    """Be in torchrun's process group, if there is one, for the time of the run: (rank, local_rank, world_size, device).

    Ranks that wait for a dead or hung one give up after `timeout` seconds; between joining and the first step and at
    the end after half an hour, since building data, compiling and closing a tracker take their time.
    """
    rank, local_rank, world_size = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if device == "auto":  # gloo, which connects ranks without CUDA, cannot sum on an Apple GPU
        device = "mps" if torch.backends.mps.is_available() and not world_size else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    if {"cuda": torch.cuda, "mps": torch.backends.mps}.get(device, torch.cpu).is_available() is False:
        raise UserError(f"device is {device}, but torch sees no such GPU: check nvidia-smi, or use --device cpu")
    device = claim_gpu(local_rank) if device == "cuda" else torch.device(device)
    if world_size:
        on_device = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        joining = max(60, timeout)  # importing torch takes one rank longer than another
        limit = timedelta(seconds=joining)
        store = store_of_this_start(next(dist.rendezvous("env://", timeout=limit))[0], rank, world_size, joining)
        dist.init_process_group(store=store, rank=rank, world_size=world_size, timeout=limit, **on_device)
        set_timeout(patience := max(1800, timeout))
    yield rank, local_rank, max(world_size, 1), device
    # only after a clean end: destroying waits for what the others wait for, half an hour where one of them has failed
    if world_size:
        set_timeout(patience)
        wait_for_all()  # a rank that leaves early takes its connections from the others
        dist.destroy_process_group()


def store_of_this_start(store, rank, world_size, timeout):
    """A part of torchrun's store that is new, and the same on all ranks.

    The store outlives a restart, with the addresses of dead ranks in it, and each machine counts its restarts apart. So
    each rank writes a name that it made up. All names together name the start once all ranks have signed them: those
    among them that a restart left behind are signed by nobody.
    """
    store.delete_key("exception_dump")  # of NCCL's watchdog, which has no prefix: new ranks that find it abort, too
    store.set(f"name of {rank}", uuid.uuid4().hex)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        names = b"".join(store.multi_get([f"name of {r}" for r in range(world_size)]))  # waits until all are there
        start = dist.PrefixStore(hashlib.sha256(names).hexdigest(), store)
        start.set(f"signed by {rank}", "")
        if start.check([f"signed by {r}" for r in range(world_size)]):
            return start
        time.sleep(0.2)
    raise TimeoutError(f"not all of {world_size} ranks have started within {timeout} s")


def set_timeout(seconds):
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(tensor):
    """Sum a tensor over all ranks in place and return it; alone, it is the sum."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor):
    """The mean of a tensor over all ranks, in place. gloo has no such reduction of its own."""
    return sum_over_ranks(tensor).div_(dist.get_world_size() if dist.is_initialized() else 1)


def from_rank_0(value):
    """Plain data of rank 0, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]
