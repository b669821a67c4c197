"""Processes that watch each other, in threads; with real processes in faults/test_lost_processes.py."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist
from waiting import until

from resmol.errors import ConfigError, ProcessLost
from resmol.train import heartbeat as module
from resmol.train.heartbeat import RankMonitor, describe_slowest


@pytest.fixture
def stores() -> Callable[[], dist.Store]:
    """Make connections to one store."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


def in_each(stores: Callable[[], dist.Store], facts: list[dict[str, str]]) -> list[Any]:
    """Let each process compare its facts with the others'; the errors, or None."""

    def compare(rank: int) -> Exception | None:
        with RankMonitor(stores(), rank, len(facts)) as siblings:
            try:
                siblings.agree(facts[rank])
            except ConfigError as error:
                return error
            return None

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(compare, range(len(facts))))


def test_equal_facts_are_agreed_on(stores: Callable[[], dist.Store]) -> None:
    assert in_each(stores, [{"step": "5", "weights": "a"}] * 3) == [None] * 3


def test_whose_facts_differ_is_said_by_all(stores: Callable[[], dist.Store]) -> None:
    errors = in_each(stores, [{"step": "5"}, {"step": "5"}, {"step": "6"}])
    assert {str(error) for error in errors} == {"process 2 has another step than process 0: 6 instead of 5"}


def test_who_is_silent_and_who_does_not_come_is_named(
    stores: Callable[[], dist.Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "SILENT_BEATS", 30)  # whoever lives has three seconds to beat once, on a busy machine
    with RankMonitor(stores(), 0, 4) as alone, RankMonitor(stores(), 1, 4) as busy, RankMonitor(stores(), 2, 4) as gone:
        alone.begin("step 8")
        busy.begin("the sample after step 7")
        gone.begin("step 8")
        at = ["step 8", "the sample after step 7", "step 8"]
        until(lambda: [sign.partition(" ")[2] for sign in alone._signs()[:3]] == at, "a sign of all three")
        gone.__exit__(None, None, None)
        with pytest.raises(ProcessLost) as lost, alone.together():
            raise RuntimeError("the connection was closed")  # what gloo raises
    assert str(lost.value) == (
        "process 2 is gone or frozen (last at step 8); process 3 is gone or frozen (last at its start); "
        "process 1 did not come (it is at the sample after step 7)"
    )


def test_work_is_what_was_not_spent_waiting(stores: Callable[[], dist.Store], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    with RankMonitor(stores(), 0, 2) as siblings:
        with siblings.together():
            now[0] += 0.25  # before the step: not part of it
        siblings.begin("step 1")
        with siblings.together():
            now[0] += 0.5
        siblings.count_work(2.5)
        assert siblings._worked == 2.0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ([3.0, 0.5], "process 0 worked 3.0 s where the others took 0.5 s"),
        ([1.0, 1.2, 4.0, 1.1], "process 2 worked 4.0 s where the others took 1.1 s"),
        ([1.0, 2.9], ""),  # less than three times
        ([0.1, 0.9], ""),  # nothing that anybody waits for
    ],
)
def test_only_who_is_much_slower_is_named(seconds: list[float], said: str) -> None:
    assert describe_slowest(seconds) == said
