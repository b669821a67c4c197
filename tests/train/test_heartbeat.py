"""Ranks that monitor each other, in threads; as processes in faults/test_lost_processes.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist
from waiting import until

from resmol.errors import ConfigError, ProcessLost
from resmol.train import heartbeat as module
from resmol.train.heartbeat import RankMonitor, describe_straggler, read_heartbeats


@pytest.fixture
def stores() -> Callable[[], dist.Store]:
    """Make connections to one store."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


def in_each(stores: Callable[[], dist.Store], facts: list[dict[str, str]]) -> list[Any]:
    """Let each rank compare its facts with the others'; the errors, or None."""

    def compare(rank: int) -> Exception | None:
        with RankMonitor(stores(), rank, len(facts)) as monitor:
            try:
                monitor.check_consistent(facts[rank])
            except ConfigError as error:
                return error
            return None

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(compare, range(len(facts))))


def test_equal_facts_are_consistent(stores: Callable[[], dist.Store]) -> None:
    assert in_each(stores, [{"step": "5", "weights": "a"}] * 3) == [None] * 3


def test_a_rank_whose_facts_differ_is_named_by_all(stores: Callable[[], dist.Store]) -> None:
    errors = in_each(stores, [{"step": "5"}, {"step": "5"}, {"step": "6"}])
    assert {str(error) for error in errors} == {"rank 2 has a different step from rank 0: 6 instead of 5"}


def test_ranks_without_a_heartbeat_and_ranks_that_do_not_arrive_are_named(
    stores: Callable[[], dist.Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "MISSED_BEATS", 30)  # whoever lives has three seconds to beat once, on a busy machine
    with RankMonitor(stores(), 0, 4) as alone, RankMonitor(stores(), 1, 4) as busy, RankMonitor(stores(), 2, 4) as gone:
        alone.set_phase("step 8")
        busy.set_phase("sample after step 7")
        gone.set_phase("step 8")
        at = ["step 8", "sample after step 7", "step 8"]
        store = alone.connect()
        until(lambda: [beat.phase for beat in read_heartbeats(store, 3)] == at, "a heartbeat of all three")
        gone.__exit__(None, None, None)
        with pytest.raises(ProcessLost) as lost, alone.collective("all-reduce"):
            raise RuntimeError("the connection was closed")  # what gloo raises
    assert re.sub(r"within \d+ s", "within 0 s", str(lost.value)) == (
        "rank 2 died or froze (last phase: step 8); rank 3 died or froze (last phase: start); "
        "rank 1 did not reach the all-reduce within 0 s (last phase: sample after step 7)"
    )


def test_work_is_what_was_not_spent_waiting(stores: Callable[[], dist.Store], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    with RankMonitor(stores(), 0, 2) as monitor:
        with monitor.collective("all-reduce"):
            now[0] += 0.25  # before the step: not part of it
        monitor.set_phase("step 1")
        with monitor.collective("all-reduce"):
            now[0] += 0.5
        monitor.count_work(2.5)
        assert monitor._worked == 2.0


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([3.0, 0.5], "rank 0 worked 3.0 s, the other ranks 0.5 s"),
        ([1.0, 1.2, 4.0, 1.1], "rank 2 worked 4.0 s, the other ranks 1.1 s"),
        ([1.0, 2.9], ""),  # less than three times
        ([0.1, 0.9], ""),  # nothing that anybody waits for
    ],
)
def test_only_a_much_slower_rank_is_a_straggler(seconds: list[float], expected: str) -> None:
    assert describe_straggler(seconds) == expected
