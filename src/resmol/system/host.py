"""The host: its processor, its memory, and what of it this process may give back or still take."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import sys
from pathlib import Path

import psutil

CPU_FACTS = Path("/proc/cpuinfo")
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of mallopt(3)
RETURNED_BYTES = 1 << 20
CGROUP_FILES = (  # the limit, what is taken of it, and what of that are pages of files
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "sys/fs/cgroup/memory.stat"),
    (
        "sys/fs/cgroup/memory/memory.limit_in_bytes",
        "sys/fs/cgroup/memory/memory.usage_in_bytes",
        "sys/fs/cgroup/memory/memory.stat",
    ),
)
FILE_PAGES = ("inactive_file", "active_file")  # given back when memory is needed; a saved checkpoint leaves gigabytes


def return_freed_memory() -> None:
    """From here on, give blocks of a megabyte and more back to the kernel as soon as they are freed.

    The opposite of `process_setup.keep_freed_memory`, for when memory is short: a heap that is kept breaks up between
    what stays (the inputs of blocks, gradients) and what goes. Costs some speed, changes no result. Does nothing
    where the C library is not glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(option, RETURNED_BYTES)


def release_freed_memory() -> None:
    """Give back to the kernel, once, all that has been freed: before another process needs it.

    `process_setup.keep_freed_memory` makes it stay otherwise. Does nothing where the C library is not glibc.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def processor_field(name: str, facts: Path = CPU_FACTS) -> str:
    """Return what Linux says of the first processor under a name such as ``vendor_id``; empty where it says nothing."""
    try:
        lines = facts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def processor_name() -> str:
    """Return the model of the processor."""
    return processor_field("model name") or platform.processor() or platform.machine()


def host_facts() -> dict[str, str]:
    """Return Python's version, the operating system and the processor; no variable, no path, no host name."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
    }


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    else:
        return os.cpu_count() or 1


def free_inodes(path: Path) -> int | None:
    """Return how many files can still be made on the file system of ``path``, None where it has no such limit.

    Raises:
        OSError: The file system does not say.
    """
    if sys.platform == "win32":
        return None
    else:
        found = os.statvfs(path)
        return found.f_favail if found.f_files > 0 else None


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that this process could still take, or None where the system does not say.

    That is what the kernel has available, but no more than what a limit of a container (cgroup 2, or 1) leaves.
    """
    try:
        free = [int(psutil.virtual_memory().available)]
    except OSError:  # no /proc
        return None
    for limit, usage, statistics in CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
            allowed, taken = (int((root / file).read_text(encoding="ascii")) for file in (limit, usage))
            free.append(allowed - taken + _file_pages(root / statistics))
    return max(0, min(free))


def _file_pages(statistics: Path) -> int:
    """Return the bytes of a cgroup that are pages of files; cgroup 1 counts those of its children as ``total_``."""
    try:
        lines = [line.split() for line in statistics.read_text(encoding="ascii").splitlines()]
        found = {name: int(value) for name, value in lines}
    except (OSError, ValueError):
        return 0
    return sum(found.get(f"total_{name}", found.get(name, 0)) for name in FILE_PAGES)
