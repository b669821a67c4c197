"""One process at a time holds a lock, whatever happens to the others."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import HANGS

from resmol.errors import RunInUse
from resmol.system.locks import exclusive_lock, kept_while_read, unless_being_read

OWNER = """
import sys
import threading
from pathlib import Path
from resmol.errors import RunInUse
from resmol.system.locks import exclusive_lock
try:
    with exclusive_lock(Path(sys.argv[1]) / "lock"):
        print("locked", flush=True)
        sys.stdin.read()
except RunInUse as error:
    print("refused", error.what, flush=True)
    sys.exit(error.exit_code)
"""
Start = Callable[[Path], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start processes that try to hold a run until their standard input ends."""
    started: list[subprocess.Popen[str]] = []

    def start_owner(path: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", OWNER, str(path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start_owner
    for process in started:
        process.kill()
        process.communicate()


def descriptors() -> list[str]:
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_the_second_process_is_refused_with_the_name_of_the_first(tmp_path: Path, start: Start) -> None:
    owner = start(tmp_path / "run")
    assert first_line(owner) == "locked\n"
    second = start(tmp_path / "run")
    message = first_line(second)
    assert message.startswith("refused")
    assert f"in use by process {owner.pid} on {socket.gethostname()}" in message
    assert second.wait(timeout=HANGS) == 75


def test_of_many_at_once_exactly_one_gets_it(tmp_path: Path, start: Start) -> None:
    processes = [start(tmp_path / "run") for _ in range(5)]
    outcomes = sorted(first_line(process).split()[0] for process in processes)
    assert outcomes == ["locked", "refused", "refused", "refused", "refused"]


def test_a_killed_owner_frees_the_run(tmp_path: Path, start: Start) -> None:
    owner = start(tmp_path / "run")
    assert first_line(owner) == "locked\n"
    with pytest.raises(RunInUse), exclusive_lock(tmp_path / "run" / "lock"):
        pass
    owner.send_signal(signal.SIGKILL)
    owner.wait(timeout=HANGS)
    with exclusive_lock(tmp_path / "run" / "lock"):
        written = json.loads((tmp_path / "run" / "lock").read_text()[1:])
    assert written == {"pid": os.getpid(), "host": socket.gethostname()}


def test_an_error_frees_the_run(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(KeyError), exclusive_lock(path):
        raise KeyError
    with exclusive_lock(path):
        pass


def test_the_lock_leaves_no_descriptor_behind(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    before = descriptors()
    with exclusive_lock(path), pytest.raises(RunInUse), exclusive_lock(path):
        pass
    assert descriptors() == before


def test_an_unreadable_owner_is_unknown_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with exclusive_lock(path):
        (tmp_path / "lock").write_bytes(b"\xff\xfe")
        with pytest.raises(RunInUse, match="in use by another process"), exclusive_lock(path):
            pass
        for content in (b"", b'{"pid": 1, "host": "\\u001b[2J"}', b'{"pid": "one"}'):
            (tmp_path / "lock").write_bytes(content)
            with pytest.raises(RunInUse, match="in use by another process"), exclusive_lock(path):
                pass


def test_a_contender_names_the_owner_of_now_and_not_the_dead_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new owner has the lock but has not written its name yet; the file still names a process that is dead."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    file = tmp_path / "lock"
    file.write_text("\0" + json.dumps({"pid": dead.pid, "host": socket.gethostname()}))
    owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
    with file.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(time, "sleep", lambda _seconds: file.write_text("\0" + owner))  # while the contender waits
        with pytest.raises(RunInUse) as refused, exclusive_lock(tmp_path / "lock"):
            pass
    assert f"process {os.getpid()} on {socket.gethostname()}" in refused.value.what


# --- file systems without locks ------------------------------------------------------------------------------


WITHOUT_FLOCK = """
import errno
import fcntl
def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""


@pytest.fixture(params=["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EINVAL"])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that answers so to `flock`."""
    number = getattr(errno, request.param)

    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_without_locks_a_file_stands_for_one(tmp_path: Path, no_flock: None, messages: list[str]) -> None:
    path = tmp_path / "run" / "lock"
    with exclusive_lock(path):
        (message,) = messages
        assert "without locks" in message
        assert "lock.soft keeps other processes out" in message
        with pytest.raises(RunInUse) as refused, exclusive_lock(path):
            pass
        assert f"in use by process {os.getpid()} on" in refused.value.what
        assert str(path.with_name("lock.soft")) in refused.value.fix
    with exclusive_lock(path):
        pass
    assert {file.name for file in path.parent.iterdir()} == {"lock"}


def test_without_locks_a_dead_process_of_this_host_is_replaced(tmp_path: Path) -> None:
    """One that was killed, so that its file stays."""
    code = WITHOUT_FLOCK + OWNER
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert first_line(process) == "locked\n"
        assert (tmp_path / "lock.soft").exists()
        process.kill()
        process.communicate()


def test_other_errors_of_the_lock_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"), exclusive_lock(tmp_path / "lock"):
        pass


# --- readers and retention -----------------------------------------------------------------------------------


def test_what_is_read_is_kept_and_what_goes_is_not_begun(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_text("{}")
    with kept_while_read(file), kept_while_read(file), unless_being_read(file) as free:
        assert not free
    with unless_being_read(file) as free:
        assert free
        with pytest.raises(FileNotFoundError), kept_while_read(file):
            pass


def test_what_is_exchanged_while_it_is_opened_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real = tmp_path / "manifest.json", fcntl.flock
    file.write_text("{}")

    def exchange_first(descriptor: int, how: int) -> None:
        file.rename(tmp_path / "moved")
        file.write_text("{}")
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", exchange_first)
    with pytest.raises(FileNotFoundError), kept_while_read(file):
        pass


def test_without_locks_nothing_is_kept(tmp_path: Path, no_flock: None) -> None:
    file = tmp_path / "manifest.json"
    file.write_text("{}")
    with kept_while_read(file), unless_being_read(file) as free:
        assert free
