"""SIGINT and SIGTERM as requests to finish the step, save, and exit."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignal:
    """While this context is open, SIGINT and SIGTERM are noted instead of ending the process.

    The training loop finishes its step, saves, and exits. A second signal changes nothing, so an impatient Ctrl-C
    cannot cut the save short. SIGHUP is ignored: a run outlives the terminal that started it. Signals can only be
    caught in the main thread; elsewhere the context does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
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
            handlers: dict[int, Any] = {
                signal.SIGINT: self._note,
                signal.SIGTERM: self._note,
                signal.SIGHUP: signal.SIG_IGN,
            }
            self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
