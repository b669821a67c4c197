"""One process at a time in a run directory, whatever happens to the others."""

from __future__ import annotations

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

import pytest
from waiting import HANGS

from resmol.errors import DataError, RunInUse
from resmol.run.directory import RunDir

OWNER = """
import sys
import threading
from pathlib import Path
from resmol.errors import RunInUse
from resmol.run.directory import RunDir
try:
    with RunDir(Path(sys.argv[1])).lock():
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
    assert f'"pid": {owner.pid}' in message
    assert f'"host": {json.dumps(socket.gethostname())}' in message
    assert second.wait(timeout=HANGS) == 75


def test_of_many_at_once_exactly_one_gets_it(tmp_path: Path, start: Start) -> None:
    processes = [start(tmp_path / "run") for _ in range(5)]
    outcomes = sorted(first_line(process).split()[0] for process in processes)
    assert outcomes == ["locked", "refused", "refused", "refused", "refused"]


def test_a_killed_owner_frees_the_run(tmp_path: Path, start: Start) -> None:
    owner = start(tmp_path / "run")
    assert first_line(owner) == "locked\n"
    with pytest.raises(RunInUse), RunDir(tmp_path / "run").lock():
        pass
    owner.send_signal(signal.SIGKILL)
    owner.wait(timeout=HANGS)
    with RunDir(tmp_path / "run").lock():
        written = json.loads((tmp_path / "run" / "lock").read_text())
    assert written == {"pid": os.getpid(), "host": socket.gethostname()}


def test_an_error_frees_the_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(KeyError), run.lock():
        raise KeyError
    with run.lock():
        pass


def test_the_lock_leaves_no_descriptor_behind(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    before = descriptors()
    with run.lock(), pytest.raises(RunInUse), run.lock():
        pass
    assert descriptors() == before


def test_an_unreadable_owner_is_unknown_not_a_crash(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with run.lock():
        (tmp_path / "lock").write_bytes(b"\xff\xfe")
        with pytest.raises(RunInUse, match="in use by another process"), run.lock():
            pass
        (tmp_path / "lock").write_bytes(b"")
        with pytest.raises(RunInUse, match="unknown"), run.lock():
            pass


def test_a_directory_without_a_configuration_is_no_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert not run.exists()
    with pytest.raises(DataError, match="is not a run directory"):
        run.require()
    run.config.write_text("")
    assert run.exists()
    run.require()


def test_every_file_of_a_run_lies_in_its_directory(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    names = [name for name, member in vars(RunDir).items() if isinstance(member, property)]
    paths = {name: getattr(run, name) for name in names}
    assert {path.parent for path in paths.values()} == {tmp_path, run.evidence}
    assert run.evidence.parent == tmp_path
    assert len({path.name for path in paths.values()}) == len(names)
    assert {paths[name].name for name in ("config", "ledger", "log", "checkpoints", "report")} == {
        "config.toml", "ledger.jsonl", "train.log", "checkpoints", "report.html",
    }  # fmt: skip


def test_a_contender_names_the_owner_of_now_and_not_the_dead_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new owner has the lock but has not written its name yet; the file still names a process that is dead."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    file = tmp_path / "lock"
    file.write_text(json.dumps({"pid": dead.pid, "host": socket.gethostname()}))
    owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
    with file.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(time, "sleep", lambda _seconds: file.write_text(owner))  # while the contender waits
        with pytest.raises(RunInUse) as refused, RunDir(tmp_path).lock():
            pass
    assert owner in refused.value.what


@pytest.mark.parametrize(
    ("evidence", "shown"),
    [
        ("/home/someone/runs/old-name/evidence/audit.json", "evidence/audit.json"),
        ("/home/someone/data/old-name/ledger.jsonl", "ledger.jsonl"),
        ("runs/old-name/checkpoints/step-00000010/manifest.json", "checkpoints/step-00000010/manifest.json"),
        ("/home/someone/runs/mine/notes/a.json", "notes/a.json"),
        ("/home/someone/elsewhere/a.json", "a.json"),
        ("../../elsewhere/a.json", "a.json"),
        ("evidence/audit.json", "evidence/audit.json"),
        ("", ""),
    ],
)
def test_evidence_is_named_without_a_folder_of_this_machine(evidence: str, shown: str, tmp_path: Path) -> None:
    """Also after the run was given another name, here ``mine``."""
    run = RunDir(tmp_path / "mine")
    run.evidence.mkdir(parents=True)
    claim = {"name": "n", "passed": True, "measured": "m", "expected": "e", "evidence": evidence}
    run.claims_file.write_text(json.dumps({"checks": [claim]}))
    assert run.claims() == [{**claim, "evidence": shown}]


@pytest.mark.parametrize("checks", [[{}], [1], {}, "x", None, [{"name": "n"}]])
def test_what_is_no_claim_is_left_out(checks: object, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.evidence.mkdir()
    run.claims_file.write_text(json.dumps({"checks": checks}))
    assert run.claims() == []
