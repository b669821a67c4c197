"""How far long work is: a bar at a terminal, elsewhere a line every half a minute; Ctrl-C ends the wait at once."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

LINE_SECONDS = 30.0
TICK_SECONDS = 0.2
_BAR_CHARACTERS = 16  # with it and a short title, the line fits 80 columns


class Advance(Protocol):
    """Shows how far work is."""

    def __call__(self, done: int, total: int | None, note: str, *, kept: int = 0) -> None:
        """Show the bytes done, of which an earlier process did ``kept``, the bytes in all and a note behind them."""


def is_live() -> bool:
    """Return whether standard error shows a line that changes: a terminal, and not the log of a CI job."""
    return sys.stderr.isatty() and not os.environ.get("CI")


@contextmanager
def byte_progress(title: str) -> Iterator[Advance]:
    """Show how far work is that is counted in bytes, on standard error, while the context is open.

    Yields:
        A function of the bytes done, the bytes in all (None where nobody knows) and a note to show behind them; bytes
        that an earlier process did say nothing about the speed.
    """
    if not is_live():
        yield ProgressLines(title).advance
        return
    columns = (
        TextColumn(title),
        BarColumn(_BAR_CHARACTERS),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, note="")
        before = 0

        def advance(done: int, total: int | None, note: str, *, kept: int = 0) -> None:
            nonlocal before
            if kept != before:  # its speed counts from here
                bar.reset(task, total=total, completed=kept)
                before = kept
            bar.update(task, completed=done, total=total, note=note)

        yield advance


@contextmanager
def step_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of so many steps are done and how long the others will take, while the context is open.

    Yields:
        A function of the steps done since it was called last.
    """
    if not is_live():
        lines, done = ProgressLines(title, parts=_step_parts), [0]

        def count(steps: int) -> None:
            done[0] += steps
            lines.advance(done[0], total, "")

        yield count
        return
    columns = (TextColumn(title), BarColumn(_BAR_CHARACTERS), MofNCompleteColumn(), TextColumn("steps"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda steps: bar.advance(task, steps)


@contextmanager
def running_time(title: str) -> Iterator[None]:
    """Show how long the work has taken, below its messages, on standard error; nothing where it is not a terminal."""
    columns = (SpinnerColumn(), TextColumn(title), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not is_live()) as clock:
        clock.add_task(title, total=None)
        yield


class ProgressLines:
    """Logs how far work is, every `LINE_SECONDS`: what stands for a bar where there is no terminal.

    Args:
        title: What is being done.
        now: The clock, in seconds.
        parts: Words for what is done, what there is in all, and what is done in a second.
    """

    def __init__(
        self,
        title: str,
        now: Callable[[], float] = time.monotonic,
        parts: Callable[[int, int | None, float], list[str]] | None = None,
    ) -> None:
        self._title = title
        self._parts = parts or _byte_parts
        self._now = now
        self._begun = self._shown = now()

    def advance(self, done: int, total: int | None, note: str, *, kept: int = 0) -> None:
        """Log a line if one is due; the arguments are those of `Advance`, and 0 bytes done says nothing of them."""
        now = self._now()
        if now - self._shown < LINE_SECONDS:
            return
        self._shown = now
        seconds = now - self._begun
        rate = (done - kept) / seconds
        parts = [*self._parts(done, total, rate), f"{_clock(seconds)} so far", note]
        logger.info(f"{self._title}: {', '.join(filter(None, parts))}")


def _byte_parts(done: int, total: int | None, rate: float) -> list[str]:
    if rate <= 0:
        return []
    if total is None:
        return [f"{done / 1e6:,.1f} MB", f"{rate / 1e6:,.1f} MB/s"]
    left = f"{_clock(max(0, total - done) / rate)} left"
    return [f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB", f"{rate / 1e6:,.1f} MB/s", left]


def _step_parts(done: int, total: int | None, rate: float) -> list[str]:
    if rate <= 0 or total is None:
        return []
    return [f"{done:,} of {total:,} steps", f"{_clock((total - done) / rate)} left"]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class Background(Generic[Result]):
    """Work in a thread of its own, which is left behind if the process ends: Rust and C do not see Ctrl-C, a wait does.

    It must not read standard input, nor call Python from Rust while the interpreter ends; either aborts the process.

    Args:
        work: What to do; it begins at once.
    """

    def __init__(self, work: Callable[[], Result]) -> None:
        self._results: list[Result] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it is still at work."""
        return self._thread.is_alive()

    def wait(self, tick: Callable[[], None]) -> Result:
        """Return what the work returns, or raise what it raises; meanwhile call ``tick`` several times a second."""
        while self.is_alive:
            tick()
            self._thread.join(TICK_SECONDS)
        if self._errors:
            raise self._errors[0]
        return self._results[0]

    def leave(self, seconds: float) -> None:
        """Give the work, which was asked to end, some seconds for it."""
        self._thread.join(seconds)

    def _run(self, work: Callable[[], Result]) -> None:
        try:
            self._results.append(work())
        except BaseException as error:  # raised again by `wait`; a panic in Rust is no `Exception`
            self._errors.append(error)
