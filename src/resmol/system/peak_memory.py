"""The peak memory of this process, and of its accelerator."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import psutil

if sys.platform != "win32":
    import resource

STATUS = Path("/proc/self/status")


def peak_memory_bytes(status: Path = STATUS) -> int:
    """Return the largest resident size that this process has had, in bytes.

    Linux counts it for the running program (``VmHWM``). Its ``ru_maxrss`` is no substitute: `exec` keeps the maximum,
    so a child begins with the size of the parent that started it. It is used only where there is no ``/proc``; Windows
    counts the peak of the working set.

    Args:
        status: The file to read it from.
    """
    with suppress(OSError):
        for line in status.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_device_memory_bytes() -> int:
    """Return the most bytes that tensors of this process had on its accelerator; 0 where PyTorch used none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.accelerator.is_available():
        return 0
    count = getattr(torch.accelerator, "max_memory_allocated", None)  # PyTorch 2.9
    return 0 if count is None else int(count())
