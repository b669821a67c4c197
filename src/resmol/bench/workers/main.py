"""The entry point of the worker processes: a task as JSON in, metrics as JSON out.

The two are files, since libraries print to standard output. Of the rest of resmol only two small modules are imported,
so that the worker of a baseline loads what the baseline's own users would.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from resmol.system.peak_memory import peak_device_memory_bytes, peak_memory_bytes
from resmol.system.process_setup import keep_freed_memory

Metrics = dict[str, Any]


def worker_main(work: Callable[[Mapping[str, Any]], Metrics]) -> None:
    """Do the task in the file ``sys.argv[1]``; write its metrics and the peak memory to the file ``sys.argv[2]``.

    The memory is that of the accelerator, if it used one. A task with ``keep_freed_memory`` gets the
    allocator of `resmol train`; a baseline as its users run it does not.
    """
    file, result = (Path(name) for name in sys.argv[1:3])
    task = json.loads(file.read_text(encoding="utf-8"))
    if task.get("keep_freed_memory"):
        keep_freed_memory()
    metrics = work(task)
    peak = peak_device_memory_bytes() or peak_memory_bytes()
    result.write_text(json.dumps({**metrics, "peak_bytes": peak}), encoding="utf-8", newline="\n")
