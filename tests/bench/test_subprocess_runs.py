"""Measured processes: their memory is their own, and they end when their time is over."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from resmol.bench.subprocess_runs import run_process, run_worker
from resmol.errors import CheckFailed
from resmol.system.processes import is_running

PYTHON = [sys.executable, "-I", "-S", "-c"]


WORKER = """
from resmol.bench.workers.main import worker_main

def work(task):
    if task["held"] < 0:
        raise SystemExit("no such thing")
    return {"length": len(b"x" * (task["held"] << 20))}

worker_main(work)
"""


def test_peak_memory_is_that_of_the_worker_and_not_of_its_parent(tmp_path: Path) -> None:
    ballast = b"x" * (400 << 20)  # what this process holds must not appear in its children
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    small, large = (run_worker("worker", {"held": held}, tmp_path, path) for held in (0, 300))
    assert len(ballast) > 0
    assert large["length"] == 300 << 20
    assert small["peak_bytes"] < 60 << 20
    assert 299 << 20 < large["peak_bytes"] - small["peak_bytes"] < 305 << 20


def test_a_worker_that_fails_leaves_no_result_of_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run_worker("worker", {"held": 0}, tmp_path, path)
    with pytest.raises(CheckFailed, match="worker failed: no such thing"):
        run_worker("worker", {"held": -1}, tmp_path, path)
    (tmp_path / "worker.py").write_text("pass", encoding="utf-8")
    with pytest.raises(CheckFailed, match="worker failed: it ended with code 0"):
        run_worker("worker", {"held": 0}, tmp_path, path)


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_is_ended_with_the_one_that_waits_for_it(number: int, tmp_path: Path) -> None:
    own = tmp_path / "pid"
    # Python's own Popen, interrupted before it returns, leaves the process behind: so the signal comes a little later.
    start = f"import os, time; open({str(own)!r}, 'w').write(str(os.getpid())); time.sleep(0.5)"
    tell = f"{start}; os.kill(os.getppid(), {int(number)})"
    # A suite in the background of a shell begins with SIGINT ignored.
    handlers = {signal.SIGTERM: lambda *_: None, signal.SIGINT: signal.default_int_handler}
    before = {one: signal.signal(one, handler) for one, handler in handlers.items()}
    try:
        with pytest.raises(KeyboardInterrupt):
            run_process([*PYTHON, f"{tell}; time.sleep(600)"], seconds=60.0)
        assert not is_running(int(own.read_text()))
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def test_memory_beyond_the_limit_is_refused_inside_the_process() -> None:
    done = run_process([*PYTHON, "held = bytearray(600 << 20)"], memory_bytes=300 << 20)
    assert done.code == 1
    assert "MemoryError" in done.stderr


def test_variables_are_added_to_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESMOL_TEST", "inherited")
    code = "import os, sys; sys.exit(os.environ.get('RESMOL_TEST', 'none'))"
    assert "inherited" in run_process([*PYTHON, code]).stderr
    assert "given" in run_process([*PYTHON, code], environment={"RESMOL_TEST": "given"}).stderr
