"""Signals as requests to finish the step, save, and exit: those of a person, and those of batch systems."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from resmol.system.standard_streams import has_room

# SIGUSR1 and SIGUSR2 announce the end of a job (Slurm's --signal, SGE's -notify, LSF's -wa), SIGXCPU the end of its
# processor time (setrlimit(2), LSF). By default each would end the process. Windows has the first two and the last.
_STOPPING = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
STOP_SIGNALS = tuple(signal.Signals[name] for name in _STOPPING if name in signal.Signals.__members__)


class StopSignal:
    """While this context is open, `STOP_SIGNALS` are noted instead of ending the process.

    The training loop finishes its step, saves, and exits. A second signal changes nothing, so an impatient Ctrl-C
    cannot cut the save short. SIGHUP is ignored: a run outlives the terminal that started it. Signals can only be
    caught in the main thread; elsewhere the context does nothing.
    """

    def __init__(self, announcement: str = "") -> None:
        """Note signals from the moment that the context is entered.

        Args:
            announcement: Written to standard error at the first signal, at once: a step may take a minute.
        """
        self.number: int | None = None
        self._announcement = announcement
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal arrived."""
        return self.number is not None

    @property
    def name(self) -> str:
        """The signal that arrived, or an empty string."""
        return "" if self.number is None else signal.Signals(self.number).name

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            handlers: dict[int, Any] = dict.fromkeys(STOP_SIGNALS, self._note)
            if "SIGHUP" in signal.Signals.__members__:
                handlers[signal.Signals["SIGHUP"]] = signal.SIG_IGN
            self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            self._announce()

    def _announce(self) -> None:
        """Write past Python's stream, which may be in the middle of a write, and only where nothing can block."""
        with suppress(OSError, ValueError):
            if self._announcement and has_room(2):
                os.write(2, f"\n{self.name}: {self._announcement}\n".encode())


@contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """While this context is open, the other `STOP_SIGNALS` raise `KeyboardInterrupt`, as Ctrl-C does by itself.

    For work that has nothing to save, but something to end: its ``finally`` clauses run. Like `StopSignal` it does
    nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, _interrupt) for number in STOP_SIGNALS if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
