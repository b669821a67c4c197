"""Freed memory is kept, threads sleep where others want the cores, and the user's own variables win."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from resmol.system import process_setup
from resmol.system.process_setup import other_runnable_threads, reason_to_sleep, set_up_process

CORES = os.cpu_count() or 1
FAULTS = """
import ctypes, resource, sys
from resmol.system.process_setup import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for _ in range(20):
    block = libc.malloc(ctypes.c_size_t(64 << 20))
    ctypes.memset(ctypes.c_void_p(block), 1, 64 << 20)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def page_faults(how: str, **variables: str) -> int:
    environment = {key: value for key, value in os.environ.items() if key not in process_setup.MALLOC_VARIABLES}
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.check_output(command, text=True, env={**environment, **variables}))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_blocks_are_faulted_in_once_and_not_twenty_times() -> None:
    pages = (64 << 20) // 4096
    assert page_faults("leave") > 15 * pages
    assert page_faults("keep") < 3 * pages


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_malloc_that_the_user_tuned_stays_as_it_is() -> None:
    assert page_faults("keep", MALLOC_MMAP_THRESHOLD_="1048576") > 15 * (64 << 20) // 4096


def running(folder: Path, threads: int) -> Path:
    """Return a file like /proc/stat in which so many threads want a core, the reader included."""
    path = folder / "stat"
    path.write_text(f"cpu 1 2 3\nprocs_running {threads}\nprocs_blocked 0\n", encoding="ascii")
    return path


def test_waiting_threads_spin_on_a_quiet_machine(tmp_path: Path) -> None:
    assert reason_to_sleep({}, running(tmp_path, 1)) == ""
    assert reason_to_sleep({}, tmp_path / "absent") == ""


@pytest.mark.skipif(CORES < 2, reason="one core has nobody to wait for")
def test_they_sleep_beside_other_programs(tmp_path: Path) -> None:
    assert "other programs" in reason_to_sleep({"OMP_NUM_THREADS": str(CORES)}, running(tmp_path, 3))
    assert reason_to_sleep({"OMP_NUM_THREADS": "1"}, running(tmp_path, 30)) == ""


def test_they_sleep_where_the_ranks_of_a_run_share_the_cores(tmp_path: Path) -> None:
    ranks = {"LOCAL_WORLD_SIZE": str(CORES), "OMP_NUM_THREADS": "2"}
    assert f"{2 * CORES} threads of this run" in reason_to_sleep(ranks, running(tmp_path, 1))
    assert reason_to_sleep(ranks | {"OMP_NUM_THREADS": "1"}, running(tmp_path, 1)) == ""


def test_the_choice_is_logged_and_the_users_own_variables_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    monkeypatch.setattr(process_setup, "reason_to_sleep", lambda _environment: "it is busy here")
    environment: dict[str, str] = {}
    set_up_process(environment)
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert messages == ["threads: waiting threads sleep, since it is busy here (OMP_WAIT_POLICY overrides this)"]
    for variable in process_setup.WAIT_VARIABLES:
        own = {variable: "1"}
        set_up_process(own)
        assert own == {variable: "1"}
    assert len(messages) == 1


def test_the_reader_itself_does_not_count(tmp_path: Path) -> None:
    assert other_runnable_threads(running(tmp_path, 1)) == 0.0
    assert other_runnable_threads(running(tmp_path, 4)) == 3.0
    assert other_runnable_threads(tmp_path / "absent") == 0.0
