"""Signals, free memory, and freed memory that goes back."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from resmol.system.host import free_memory
from resmol.system.signals import StopSignal


def test_the_first_signal_counts_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.requested, stop.name, stop.number) == (True, "SIGTERM", 15)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_signals_of_people_and_of_schedulers_are_requests_to_stop(name: str) -> None:
    number = signal.Signals[name]
    with StopSignal() as stop:
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.name, stop.number) == (True, name, number)


def test_outside_the_main_thread_it_does_nothing() -> None:
    seen = []

    def work() -> None:
        with StopSignal() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.fixture
def five_megabytes_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5000 * 1024))


def test_free_memory_is_what_the_kernel_says() -> None:
    stated = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    found = free_memory(Path("/nowhere"))
    assert found is not None
    assert 0.5 < found / (1024 * int(stated.split()[1])) < 2


def test_free_memory_is_unknown_where_the_kernel_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> None:
        raise FileNotFoundError("/proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", nothing)
    assert free_memory() is None


@pytest.mark.usefixtures("five_megabytes_are_free")
def test_free_memory_is_what_a_container_leaves(tmp_path: Path) -> None:
    assert free_memory(tmp_path) == 5000 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000\n")
    for limit, expected in (("max", 5000 * 1024), ("4096", 3096), ("500", 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert free_memory(tmp_path) == expected


@pytest.mark.parametrize(
    ("folder", "names", "statistics"),
    [
        (".", ("memory.max", "memory.current"), "anon 1\ninactive_file 600\nactive_file 200\n"),
        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"),
         "active_file 1\ntotal_inactive_file 600\ntotal_active_file 200\n"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("five_megabytes_are_free")
def test_pages_of_files_are_free_also_in_a_container(
    tmp_path: Path, folder: str, names: tuple[str, str], statistics: str
) -> None:
    """A checkpoint that was saved stays in the page cache, which is given back when memory is needed."""
    group = tmp_path / "sys" / "fs" / "cgroup" / folder
    group.mkdir(parents=True)
    for name, value in zip(names, ("4096", "1000"), strict=True):
        (group / name).write_text(f"{value}\n")
    (group / "memory.stat").write_text(statistics)
    assert free_memory(tmp_path) == 4096 - 1000 + 800


HOLES = """
import sys
from resmol.system.host import return_freed_memory
from resmol.system.process_setup import keep_freed_memory
keep_freed_memory()
if sys.argv[1] == "return":
    return_freed_memory()
import torch
kept = []
for _ in range(20):  # what stays lies between what goes
    gone = torch.ones(5_000_000)
    kept.append(torch.ones(300_000))
    del gone
    kept.append(torch.ones(300_000))
print(int(open("/proc/self/statm").read().split()[1]) * 4096)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_goes_back_when_asked_for() -> None:
    def resident(how: str) -> int:
        command = [sys.executable, "-c", HOLES, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert resident("return") < resident("keep") - 20_000_000


GONE = """
import sys
import torch
from resmol.system.host import release_freed_memory
from resmol.system.process_setup import keep_freed_memory
keep_freed_memory()

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

before = resident()
gone = [torch.ones(1_000_000) for _ in range(60)]
kept = torch.ones(1_000)  # above them in the heap
del gone
if sys.argv[1] == "release":
    release_freed_memory()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_is_released_for_others() -> None:
    def growth(how: str) -> int:
        command = [sys.executable, "-c", GONE, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert growth("keep") > 200_000_000
    assert growth("release") < 100_000_000


def test_a_signal_is_answered_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignal("saving"):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().err == "\nSIGINT: saving\n", "before anything else happens, and once"


def test_a_reader_that_does_not_read_does_not_hold_the_signal_up() -> None:
    code = """
import os, signal, sys
from resmol.system.signals import StopSignal
os.set_blocking(2, False)
try:
    while True:
        os.write(2, b"." * 65536)
except BlockingIOError:
    os.set_blocking(2, True)
with StopSignal("saving") as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    print(stop.name)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "SIGTERM\n"  # nobody reads standard error
    process.communicate()
