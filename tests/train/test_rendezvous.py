"""Ranks that find each other in a store which an earlier start has used, in threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from resmol.train.rendezvous import _gather, _join

MINUTE = timedelta(minutes=1)


def test_a_second_start_has_a_name_of_its_own_that_only_living_ranks_learn() -> None:
    """Rank 1 of the first start is dead, and what it wrote is still there when rank 0 of the second one looks."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False) for _ in range(3)]
    names = []
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            gathered = pool.submit(_gather, stores[0], 3, MINUTE)
            assert _join(stores[2], 2)
            assert not gathered.done(), "rank 1 has not come"
            joined = pool.submit(_join, stores[1], 1)
            assert gathered.result() == joined.result()
            names.append(gathered.result())
    assert len(set(names)) == 2


def test_a_rank_that_does_not_come_is_named() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(dist.DistStoreError, match="rank 1 did not come within 0 s"):
        _gather(server, 2, timedelta(seconds=0.1))
