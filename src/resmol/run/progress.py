"""What shows a run while it is trained: ``train.log`` always; a terminal or a notebook where that is wanted."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from resmol.config.run_config import RunConfig
from resmol.run.console import ConsoleWriter
from resmol.run.directory import RunDir
from resmol.run.log_writers import LogWriter, StepFormatter, TextLogWriter
from resmol.run.notebook import NotebookWriter, in_notebook
from resmol.run.trackers import tracker_writers

Progress = bool | Literal["auto"]


def run_log_writers(run: RunDir, config: RunConfig, progress: Progress) -> list[LogWriter]:
    """Return the views of a run's ledger.

    Args:
        run: The run directory.
        config: Says how often, and which trackers are among them.
        progress: Whether steps are shown to a person; ``"auto"``: at a terminal and in a notebook.

    Raises:
        UsageError: A tracker is wanted and not installed.
    """
    every, last = config.logging.every, config.train.steps
    writers: list[LogWriter] = [TextLogWriter(run.log, StepFormatter(every, last))]
    if _is_shown(progress):
        make = NotebookWriter if in_notebook() else ConsoleWriter
        writers.append(make(StepFormatter(every, last)))
    return [*writers, *tracker_writers(run, config)]


@contextmanager
def shown_messages(progress: Progress) -> Iterator[None]:
    """Print the package's messages while the context is open, if progress is shown and nothing else handles them."""
    package = logging.getLogger("resmol")
    handled = any(not isinstance(handler, logging.NullHandler) for handler in package.handlers)
    if handled or not _is_shown(progress):
        yield
        return
    handler, level = logging.StreamHandler(sys.stdout if in_notebook() else sys.stderr), package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def _is_shown(progress: Progress) -> bool:
    return in_notebook() or sys.stderr.isatty() if progress == "auto" else progress
