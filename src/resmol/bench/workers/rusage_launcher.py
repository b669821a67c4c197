"""A small process between the one that measures and the one that is measured; a program, `measurement.py` starts it.

Linux counts into the peak memory of a process what its parent held when it was started (``exec`` keeps ``maxrss``), so
whoever loaded PyTorch would find a few hundred megabytes in every child. This file imports only what is small.

    python -I -S launcher.py REPORT MEMORY_BYTES COMMAND...
"""

from __future__ import annotations

import json
import os
import resource
import sys


def main() -> None:
    """Run the command, write its usage of time and memory into REPORT, and exit as it did."""
    report, limit, command = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    child = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    numbers = {
        "code": code,
        "peak_bytes": usage.ru_maxrss * 1024,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
    }
    with open(report, "w", encoding="utf-8") as out:  # noqa: PTH123 - pathlib is not small
        json.dump(numbers, out)


if __name__ == "__main__":
    main()
