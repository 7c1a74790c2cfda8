"""Runs on two hosts, and the start that all ranks agree on."""

import contextlib
import random
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from two_hosts import CASES, allowed, run_case

from lib.distributed import store_of_this_start


def ranks_start(store, world_size, delays, timeout):
    """Let ranks start, each after its delay in seconds by rank; returns the stores they got."""
    got = {}

    def start(rank):
        time.sleep(delays[rank])
        client = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=timeout))
        with contextlib.suppress(TimeoutError, dist.DistStoreError):
            got[rank] = store_of_this_start(client, rank, world_size, timeout)

    threads = [threading.Thread(target=start, args=(rank,)) for rank in delays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def test_ranks_that_start_again_share_nothing_with_the_dead():
    rng = random.Random(0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for start in range(4):
        store.set("exception_dump", "left by NCCL's watchdog")
        world_size = rng.choice([2, 3, 4])
        if start % 2:  # one is dead before it could start
            assert not ranks_start(store, world_size, {rank: 0 for rank in range(start % world_size)}, timeout=0.3)
        stores = ranks_start(store, world_size, {r: rng.random() * 0.1 for r in range(world_size)}, timeout=20)
        assert not store.check(["exception_dump"])
        assert len(stores) == world_size and not any(s.check(["address"]) for s in stores.values())
        stores[0].set("address", str(start))
        assert [s.get("address") for s in stores.values()] == [str(start).encode()] * world_size


@pytest.mark.by_hand
@pytest.mark.skipif(not allowed(), reason="takes network namespaces: Linux, root and iproute2")
@pytest.mark.timeout(500)
def test_a_worker_killed_on_two_hosts_is_replaced_and_the_losses_are_those_of_one_process():
    codes, _, wrong = run_case(*CASES["worker 0"], limit=300)
    assert codes == [0, 0] and wrong == 0
