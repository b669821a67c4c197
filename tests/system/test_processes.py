"""Processes that are started apart: interrupted once, killed with all that they started, limited, seen alive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from waiting import HANGS, until

from resmol.system import processes
from resmol.system.processes import ask_to_stop, is_running, kill_group, limit_private_memory, start_apart

PARENT = """
import subprocess, sys
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
Path(sys.argv[1]).write_text(str(child.pid))
child.wait()
"""
STOPPED = """
import signal, time
def stop(number, _):
    raise SystemExit(number)
signal.signal({name}, stop)
print("ready", flush=True)
time.sleep(1000)
"""


def test_a_process_is_seen_alive_and_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert is_running(os.getpid())
    assert is_running(1), "another user's"
    assert not is_running(child.pid)


@pytest.mark.parametrize("system", ["linux", "win32"])
def test_a_group_is_killed_whole(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start_apart([sys.executable, "-c", PARENT, str(tmp_path / "child")])
    until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text(), "a child")
    child = psutil.Process(int((tmp_path / "child").read_text()))
    monkeypatch.setattr(sys, "platform", system)
    kill_group(process)
    assert process.returncode == -signal.SIGKILL
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the end of the child")


@pytest.mark.parametrize(("system", "arrives"), [("linux", signal.SIGTERM), ("win32", signal.SIGUSR2)])
def test_it_is_asked_to_stop_by_a_signal_that_does_not_end_it(
    system: str, arrives: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = STOPPED.format(name=int(arrives))
    process = start_apart([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(signal, "CTRL_BREAK_EVENT", signal.SIGUSR2, raising=False)
    ask_to_stop(process, signal.SIGTERM)
    process.communicate(timeout=HANGS)
    assert process.returncode == arrives


def test_it_leads_a_group_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    process = start_apart(
        [sys.executable, "-c", "import os; print(os.getpgid(0) == os.getpid())"], stdout=subprocess.PIPE
    )
    assert process.communicate(timeout=HANGS)[0] == b"True\n"
    started: dict[str, object] = {}
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    monkeypatch.setattr(processes.subprocess, "Popen", lambda command, **options: started.update(options) or process)
    start_apart(["program"])
    assert started == {"creationflags": 512}


def test_private_memory_is_limited() -> None:
    code = "import sys; sys.stdin.read(); bytes(1 << 30)"
    process = start_apart([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    limit_private_memory(process, 200 << 20)
    _, error = process.communicate(timeout=HANGS)
    assert b"MemoryError" in error
