"""
Helpers for the ranks of a run, beyond torch.distributed. Without torchrun there is a single rank.
"""

import hashlib
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

SETUP_TIMEOUT = 1800  # seconds: building data, compiling and closing a tracker take a while


def torchrun_ranks():
    """(rank, local_rank, world_size) as torchrun sets them; (0, 0, 0) without it."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if not all(os.environ.get(name) for name in (*names, "MASTER_ADDR", "MASTER_PORT")):
        return 0, 0, 0
    return tuple(int(os.environ[name]) for name in names)


def new_store(rank, world_size, timeout):
    """A fresh namespace in torchrun's store, the same on all ranks.

    The store outlives a restart, with the addresses of dead ranks in it, and each machine counts its own restarts. So
    each rank writes a random name. The hash of all names identifies this start once every rank has signed it; a hash
    that includes a name from an earlier start is never signed by all.
    """
    store = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))[0]
    return store_of_this_start(store, rank, world_size, timeout)


def store_of_this_start(store, rank, world_size, timeout):
    store.delete_key("exception_dump")  # from NCCL's watchdog, without a prefix: new ranks that find it abort, too
    store.set(f"name of {rank}", uuid.uuid4().hex)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        names = b"".join(store.multi_get([f"name of {r}" for r in range(world_size)]))  # waits until all are there
        start = dist.PrefixStore(hashlib.sha256(names).hexdigest(), store)
        start.set(f"signed by {rank}", "")
        if start.check([f"signed by {r}" for r in range(world_size)]):
            return start
        time.sleep(0.2)
    raise TimeoutError(f"not all {world_size} ranks started within {timeout} s")


def set_timeout(seconds):
    """Set how long ranks wait for one that is dead or hung."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(tensor):
    """Sum a tensor over all ranks in place and return it; with a single rank, it is unchanged."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def group_device():
    """The device on which tensors are summed over ranks: NCCL takes GPU tensors only."""
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


def is_main_rank():
    return not dist.is_initialized() or dist.get_rank() == 0


def from_rank_0(value):
    """Return rank 0's value, plain data, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]
