"""Peak memory is that of the program itself: what its parent held does not count, what it held itself does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from resmol.system.peak_memory import peak_memory_bytes

MIB = 1 << 20
CHILD = """
from resmol.system.peak_memory import peak_memory_bytes
before = peak_memory_bytes()
held = b"x" * (int(__import__("sys").argv[1]) << 20)
del held
print(before, peak_memory_bytes())
"""


def peaks(mebibytes: int) -> tuple[int, int]:
    """Return what a child reports before and after it held so much memory."""
    command = [sys.executable, "-c", CHILD, str(mebibytes)]
    before, after = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(before), int(after)


def test_a_child_reports_what_it_held_and_not_what_its_parent_holds() -> None:
    ballast = b"x" * (400 * MIB)
    before, after = peaks(300)
    assert len(ballast) > 0
    assert before < 60 * MIB
    assert 299 * MIB < after - before < 305 * MIB


def test_windows_states_the_peak_of_the_working_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    facts = SimpleNamespace(peak_wset=12345)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: facts))
    assert peak_memory_bytes(tmp_path / "missing") == 12345


def test_where_there_is_no_proc_the_figure_of_getrusage_is_taken(tmp_path: Path) -> None:
    assert 0.5 < peak_memory_bytes(tmp_path / "missing") / peak_memory_bytes() < 50
    (tmp_path / "status").write_text("Name:\tpython\n", encoding="utf-8")
    assert peak_memory_bytes(tmp_path / "status") > 0
    (tmp_path / "status").write_text("VmPeak:\t 9 kB\nVmHWM:\t  20 kB\n", encoding="utf-8")
    assert peak_memory_bytes(tmp_path / "status") == 20 * 1024
