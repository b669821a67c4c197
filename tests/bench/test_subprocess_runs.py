"""Measured processes: their memory is their own, they end when their time is over, and turns are taken."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from resmol.bench.subprocess_runs import run_process, take_turns

PYTHON = [sys.executable, "-I", "-S", "-c"]


def test_peak_memory_is_that_of_the_process_and_not_of_its_parent() -> None:
    ballast = b"x" * (400 << 20)  # what this process holds must not appear in its children
    small = run_process([*PYTHON, "pass"])
    large = run_process([*PYTHON, "held = b'x' * (200 << 20)"])
    assert len(ballast) > 0
    assert small.peak_bytes < 60 << 20
    assert 200 << 20 < large.peak_bytes < 260 << 20


def test_a_failure_keeps_its_code_and_its_last_words() -> None:
    done = run_process([*PYTHON, "import sys; print('first', file=sys.stderr); sys.exit('no such thing')"])
    assert done.code == 1
    assert done.error_tail == "first no such thing"
    killed = run_process([*PYTHON, "import os; os.kill(os.getpid(), 9)"])
    assert killed.code == -signal.SIGKILL
    assert killed.error_tail == "it ended with code -9"


def test_a_process_is_ended_with_its_time(tmp_path: Path) -> None:
    own = tmp_path / "pid"
    wait = f"import os, time; open({str(own)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    for seconds in (1.0, 10.0, 100.0):  # on a busy machine a second may be over before the process has begun
        done = run_process([*PYTHON, wait], seconds=seconds)
        if own.exists() and own.read_text():
            break
    assert done.timed_out
    assert done.code == -signal.SIGKILL
    for _ in range(6000):  # the kernel takes a moment to bury it
        try:
            os.kill(int(own.read_text()), 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail("the measured process outlived its measurement")


def test_memory_beyond_the_limit_is_refused_inside_the_process() -> None:
    done = run_process([*PYTHON, "held = bytearray(600 << 20)"], memory_bytes=300 << 20)
    assert done.code == 1
    assert "MemoryError" in done.said


def test_an_allocator_of_this_process_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.top_pad=1")
    code = "import os, sys; sys.exit(os.environ.get('GLIBC_TUNABLES', 'none'))"
    assert run_process([*PYTHON, code]).error_tail == "none"
    given = run_process([*PYTHON, code], environment={"GLIBC_TUNABLES": "glibc.malloc.top_pad=2"})
    assert given.error_tail == "glibc.malloc.top_pad=2"


def test_everything_is_measured_once_a_round_in_changing_order(messages: list[str]) -> None:
    seen: list[int] = []

    def measure(index: int) -> str:
        seen.append(index)
        return f"number {index}"

    assert take_turns(4, 6, 0, measure)
    rounds = [seen[start : start + 4] for start in range(0, 24, 4)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert "round 6 of 6" in messages[-1]
    assert "about 0 s left" in messages[-1]


def test_an_interruption_is_an_answer(messages: list[str]) -> None:
    def interrupted(_: int) -> str:
        raise KeyboardInterrupt

    assert not take_turns(2, 2, 0, interrupted)
    assert messages == ["interrupted: this is what was measured"]
