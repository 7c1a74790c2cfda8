"""Helpers for the ranks of a run, beyond torch.distributed. Without torchrun there is a single rank."""

import contextlib
import hashlib
import itertools
import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from lib.console import Stopped, UserError, report

PATIENCE = 1800  # seconds to wait for a rank that builds data, compiles, saves, or closes a tracker
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
meetings = {}  # of this process group: its store, and the numbers of the meetings


def torchrun_ranks():
    """(rank, local_rank, world_size) as torchrun sets them; (0, 0, 0) without it. Raises UserError if they are set only
    in part, since each rank would train alone."""
    values = {name: os.environ.get(name, "") for name in NAMES}
    if not (values["RANK"] or values["LOCAL_RANK"]) and values["WORLD_SIZE"] in ("", "1"):
        return 0, 0, 0
    numbers = [int(values[name]) if values[name].isdecimal() else -1 for name in NAMES[:3]]
    if not all(values.values()) or min(numbers) < 0 or numbers[0] >= numbers[2]:
        raise UserError(f"the environment names no rank: {values}. Start with torchrun, set all of these, or none")
    return tuple(numbers)


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


def fresh_start(rank, world_size, timeout):
    """What init_process_group needs: the rank, and a fresh namespace in torchrun's store, the same on all ranks.

    The store outlives a restart, with the addresses of dead ranks in it, and each machine counts its own restarts. So
    each rank writes a random name. The hash of all names identifies this start once every rank has signed it; a hash
    that includes a name from an earlier start is never signed by all.
    """
    patience = max(60, timeout)  # ranks finish importing torch at different times
    store = next(dist.rendezvous("env://", timeout=timedelta(seconds=patience)))[0]
    store = store_of_this_start(store, rank, world_size, patience)
    meetings.update(store=store, numbers=itertools.count())
    return {"store": store, "rank": rank, "world_size": world_size, "timeout": timedelta(seconds=timeout)}


@contextlib.contextmanager
def leaving_together():
    """Wait for all ranks on exit: one that leaves early would close connections that others use. A rank that fails does
    not wait: it ends, and torchrun ends the others."""
    try:
        yield
    except BaseException as error:
        if dist.is_initialized() and dist.get_world_size() > 1 and not isinstance(error, Stopped):
            os._exit(report(error))
        raise
    finally:
        wait_for_all()
        if dist.is_initialized():
            dist.barrier()  # rank 0 may hold the store, and has to answer the others before it leaves


def wait_for_all():
    """Wait until all ranks have come here, for as long as one may be busy with something that is no training step: up
    to PATIENCE, whatever the time limit of the process group."""
    if dist.is_initialized():
        store = meetings["store"]
        name = f"meeting {next(meetings['numbers'])}"
        try:
            if store.add(name, 1) == dist.get_world_size():
                store.set(f"{name} is over", "")
            store.wait([f"{name} is over"], timedelta(seconds=PATIENCE))
        except dist.DistNetworkError:  # torchrun was killed, and its store with it: these ranks are about to stop
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


def from_rank_0(text):
    """Return rank 0's text, or None, on every rank; as patient as wait_for_all."""
    if not dist.is_initialized():
        return text
    store = meetings["store"]
    name = f"text {next(meetings['numbers'])}"
    if is_main_rank():
        store.set(name, json.dumps(text))
    store.wait([name], timedelta(seconds=PATIENCE))
    return json.loads(store.get(name))
