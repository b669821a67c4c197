"""Set up a process before it imports PyTorch: its freed memory, its waiting threads, and bits that travel.

**Memory.** glibc returns every block over 32 MB to the kernel as soon as it is freed, and the next one of that size
faults all its pages in again: some 57,000 page faults in a step of SmolLM2-135M. `mallopt` raises the thresholds.

**Threads.** OpenMP's threads spin for milliseconds while they wait for work. That is fastest on a quiet machine. Beside
another program it is slowest by far, because the thread that the others wait for gets no core. No spin count is good at
both ends (docs/performance.md), so a short look at the run queue decides between spinning and sleeping.

Neither changes a result. The user's own variables win.

**Bits that travel.** PyTorch and MKL choose their kernels by the processor when they are loaded. For a run with
``runtime.determinism = "portable"`` two variables make them take those that every x86-64 processor has.
`train.portable` asks afterwards whether they did.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import statistics
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from resmol.system.host import usable_cores

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)
MALLOC_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_")
KEPT_BYTES, TOP_PAD_BYTES = (1 << 31) - 1, 64 << 20
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SAMPLES, SECONDS_BETWEEN_SAMPLES = 10, 0.004
TOLERATED_THREADS = 0.5  # of other programs, beyond the idle cores, before waiting threads sleep
KERNEL_STATISTICS = Path("/proc/stat")
PORTABLE_VARIABLES = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}

logger = logging.getLogger(__name__)


def set_up_process(environment: MutableMapping[str, str] = os.environ, *, portable: bool = False) -> None:
    """Keep freed memory, choose how threads wait, and, if ``portable``, kernels for any x86-64 processor.

    Call it before PyTorch is imported.
    """
    if portable:
        environment.update(PORTABLE_VARIABLES)
    keep_freed_memory(environment)
    if any(name in environment for name in WAIT_VARIABLES):
        return
    reason = reason_to_sleep(environment)
    if reason:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        logger.info(f"threads: waiting threads sleep, since {reason} (OMP_WAIT_POLICY overrides this)")


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> None:
    """Make glibc keep freed blocks for the next step; does nothing elsewhere, or where the user has tuned it."""
    if platform.libc_ver()[0] == "glibc" and not any(name in environment for name in MALLOC_VARIABLES):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)  # an older glibc refuses more than 32 MB and stays as it is
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_TOP_PAD, TOP_PAD_BYTES)


def reason_to_sleep(environment: Mapping[str, str], statistics_file: Path = KERNEL_STATISTICS) -> str:
    """Return why waiting threads should sleep; empty where they may spin, or where the load is unknown (not Linux)."""
    cores = os.cpu_count() or 1
    allowed = usable_cores()
    threads = _positive(environment.get("OMP_NUM_THREADS", "").partition(",")[0], allowed)
    ranks = _positive(environment.get("LOCAL_WORLD_SIZE", ""), 1)
    if threads == 1:
        return ""  # there is nobody to wait for
    if ranks * threads > allowed:
        return f"{ranks * threads} threads of this run share {allowed} cores"
    others = other_runnable_threads(statistics_file)
    if others + ranks * threads > cores + TOLERATED_THREADS:
        return f"other programs keep {others:.1f} of {cores} cores busy"
    return ""


def other_runnable_threads(statistics_file: Path = KERNEL_STATISTICS) -> float:
    """Return how many threads besides this one want a core: the mean of a few samples, 40 ms in all."""
    counts = []
    for _ in range(SAMPLES):
        try:
            lines = statistics_file.read_text(encoding="ascii").splitlines()
            counts.append(next(int(line.split()[1]) for line in lines if line.startswith("procs_running ")) - 1)
        except (OSError, ValueError, StopIteration):
            return 0.0
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    return max(0.0, statistics.fmean(counts))


def _positive(text: str, default: int) -> int:
    return int(text) if text.strip().isdecimal() and int(text) > 0 else default
