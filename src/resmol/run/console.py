"""The log writer for a terminal: lines as they are recorded, a live progress line; training never waits for it."""

from __future__ import annotations

import os
import sys
import time
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from resmol.run.ledger import Record
from resmol.run.log_writers import SAMPLE_INDENT, StepFormatter
from resmol.system.standard_streams import LossyStream

REFRESH_SECONDS = 0.2  # of the live line
BAR_FITS = 108  # columns for a live line with a long bar
SILENCE_SECONDS = 30.0  # where there is no live line, a step is shown at least this often


class _PatientConsole(Console):
    """A console whose broken pipe is an error like any other; rich's own answer would end the process, unsaved."""

    def on_broken_pipe(self) -> None:
        """Hand the error to the caller; it is called while that error is being handled."""
        raise BrokenPipeError


class ConsoleWriter:
    """Prints the lines on standard error; on a terminal, with a live progress line below them."""

    def __init__(self, formatter: StepFormatter, stream: IO[str] | None = None) -> None:
        lossy: Any = LossyStream(stream or sys.stderr)
        self._console = _PatientConsole(file=lossy, highlight=False, soft_wrap=True)
        self._formatter = formatter
        live = self._console.is_terminal and not os.environ.get("CI")
        self._bar = self._make_bar() if live else None
        self._task = self._bar.add_task("", total=formatter.last) if self._bar else None
        self._shown = 0.0
        self._printed = self._started = time.monotonic()
        self._first_step: int | None = None
        if self._bar:
            self._bar.start()

    def _make_bar(self) -> Progress:
        columns = (
            BarColumn(30 if self._console.width >= BAR_FITS else 8),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        return Progress(*columns, console=self._console, auto_refresh=False, transient=True)

    def show(self, record: Record) -> None:
        """Print the record's line, if it has one, and move the progress line."""
        overdue = self._bar is None and time.monotonic() - self._printed > SILENCE_SECONDS
        width = self._console.width if self._console.is_terminal else None
        text = self._formatter.line(record, force=overdue, width=width)
        if text is not None:
            self._printed = time.monotonic()
            lines = "\n".join(map(self._folded, text.split("\n")))
            self._console.print(lines + self._time_left(record), markup=False)
        if (
            self._bar
            and self._task is not None
            and record["kind"] == "step"
            and time.monotonic() - self._shown > REFRESH_SECONDS
        ):
            self._shown = time.monotonic()
            rate = record["tokens"] / record["seconds"] if record["seconds"] else 0.0
            note = f"loss {record['loss']:.3f}  lr {record['lr']:.1e}  {rate:,.0f} tok/s"
            self._bar.update(self._task, completed=record["step"], description=note, refresh=True)

    def _folded(self, line: str) -> str:
        """Break a line of a sample at the terminal's width; each part has the mark that it belongs to one."""
        if not (self._console.is_terminal and line.startswith(SAMPLE_INDENT)):
            return line
        width = max(1, self._console.width - len(SAMPLE_INDENT))
        parts = Text(line.removeprefix(SAMPLE_INDENT)).wrap(self._console, width, overflow="fold")
        return "\n".join(f"{SAMPLE_INDENT}{part.plain.rstrip()}" for part in parts)

    def _time_left(self, record: Record) -> str:
        """Estimate the rest from the pace so far, saves and evaluations included; a live line does it by itself."""
        if record["kind"] != "step" or self._bar is not None:
            return ""
        if self._first_step is None:
            self._first_step, self._started = record["step"], time.monotonic()
            return ""
        pace = (time.monotonic() - self._started) / max(1, record["step"] - self._first_step)
        left = round(pace * (self._formatter.last - record["step"]))
        return f" | {left // 60}:{left % 60:02d} left" if left else ""

    def close(self) -> None:
        """Take the progress line away."""
        if self._bar:
            self._bar.stop()
