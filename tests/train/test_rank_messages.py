"""Messages between ranks: all get all, in order; who does not answer is named; nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from resmol.errors import ProcessLost
from resmol.run.ranks import Ranks, together
from resmol.train import rank_messages
from resmol.train.heartbeat import RankMonitor
from resmol.train.rank_messages import RankMessages

WORLD = 3


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def groups(store: dist.TCPStore, seconds: float = 60.0) -> list[RankMessages]:
    made = []
    for rank in range(WORLD):
        connection = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=seconds))
        made.append(RankMessages(dist.PrefixStore("attempt", connection), rank, WORLD))
    return made


def on_each(ranks: list[RankMessages], work: Callable[[RankMessages], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(work, ranks))


def test_all_ranks_get_the_messages_of_all_and_the_store_forgets_them(store: dist.TCPStore) -> None:
    """Two threads of each rank exchange at the same time, at their own pace."""
    ranks = groups(store)
    others = [group.for_thread() for group in ranks]

    def talk(group: RankMessages) -> list[list[Any]]:
        return [group.exchange("talk", [group.rank, number, None]) for number in range(20)]

    before = store.num_keys()
    results = on_each([*ranks, *others], talk)
    assert results == [[[[rank, number, None] for rank in range(WORLD)] for number in range(20)]] * (2 * WORLD)
    assert store.num_keys() - before == 2 * (WORLD + 1)  # the last exchange of each thread


def lost(group: Ranks) -> str:
    with pytest.raises(ProcessLost) as error:
        group.exchange("write step-00000005", None)
    return error.value.what


def test_a_rank_that_does_not_answer_is_named(store: dist.TCPStore) -> None:
    """Rank 2 is alive and does something else; ranks 0 and 1 both say so."""
    ranks = groups(store, seconds=0.5)
    for text in on_each(ranks[:2], lost):
        assert text.startswith("cannot write step-00000005: rank 2 did not do its part within"), text


def test_a_dead_rank_is_named_before_the_limit(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others send heartbeats while they wait; rank 2 has sent some, and no more."""
    monkeypatch.setattr(rank_messages, "DEAD_SECONDS", 2.5)
    monkeypatch.setattr(rank_messages, "LOOK_SECONDS", 0.1)
    ranks = groups(store, seconds=3600)
    with RankMonitor(ranks[2]._store, 2, WORLD) as monitor:
        monitor.set_phase("step 7")
        while not ranks[0]._store.check(["resmol/heartbeat/2"]):
            time.sleep(0.01)
    with RankMonitor(ranks[0].for_thread()._store, 0, WORLD), RankMonitor(ranks[1].for_thread()._store, 1, WORLD):
        for text in on_each(ranks[:2], lost):
            assert text.startswith("cannot write step-00000005: rank 2 died or froze (last phase: "), text


def test_an_abandoned_wait_ends(store: dist.TCPStore) -> None:
    """What all ranks have done is still found out."""
    ranks = groups(store, seconds=3600)
    assert on_each(ranks, lambda group: group.exchange("begin", group.rank)) == [[0, 1, 2]] * 3
    ender = threading.Timer(0.2, ranks[0].abandon)
    ender.start()
    assert "rank 1, rank 2 did not do its part" in lost(ranks[0])
    ender.join()


def test_an_error_of_one_rank_is_raised_by_all(store: dist.TCPStore) -> None:
    def work(group: RankMessages) -> str:
        def fail() -> None:
            if group.rank == 1:
                raise PermissionError(13, "not allowed", "/some/file")

        with pytest.raises(PermissionError) as error:
            together(group, "write", fail)
        return str(error.value)

    own, *_ = {text for text in on_each(groups(store), work) if "rank 1" not in text}
    assert own == "[Errno 13] not allowed: '/some/file'"
