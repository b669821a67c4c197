"""Running a measured process on a task: one JSON file in, one out (see answering.py)."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resmol.bench.subprocess_runs import Finished, run_process
from resmol.bench.workers.main import Metrics
from resmol.errors import CheckFailed


def run_worker(
    module: str, task: Mapping[str, Any], folder: Path, environment: Mapping[str, str] | None = None
) -> Metrics:
    """Run ``python -m module`` on a task.

    Args:
        module: A module that ends with `answer`.
        task: What it gets; JSON.
        folder: For the two files.
        environment: Variables besides this process's own.

    Returns:
        What it answered, with the figures of the whole process.

    Raises:
        CheckFailed: It failed, or answered nothing.
    """
    given, answered = folder / "task.json", folder / "answer.json"
    given.write_text(json.dumps(task), encoding="utf-8")
    answered.unlink(missing_ok=True)
    command = [sys.executable, "-m", module, str(given), str(answered)]
    done = run_process(command, environment=environment)
    return _read_answer(module, done, answered)


def _read_answer(module: str, done: Finished, answered: Path) -> Metrics:
    if done.code or not answered.is_file():
        raise CheckFailed(
            f"{module} failed: {done.error_tail}", fix="see its message; a peer can be left out of the comparison"
        )
    numbers = json.loads(answered.read_text(encoding="utf-8"))
    whole = {"process_seconds": done.seconds, "processor_seconds": done.processor_seconds}
    return {**numbers, "peak_bytes": done.peak_bytes, **whole}
