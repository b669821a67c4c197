"""The operating system's side of a process: its memory allocator and its signals.

glibc returns every block over 32 MB to the kernel as soon as it is freed, and the next one of that size faults all
its pages in again. A training step allocates and frees hundreds of megabytes, so this costs a fifth to a third of
its time. The thresholds can only be raised from outside, by an environment variable read at process start.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

ALLOCATOR_VARIABLE = "GLIBC_TUNABLES"
ALLOCATOR_SETTINGS = ":".join(
    (
        "glibc.malloc.mmap_threshold=4294967296",  # blocks below 4 GiB come from the heap
        "glibc.malloc.trim_threshold=17179869184",  # the heap is not returned while it may be needed again
        "glibc.malloc.top_pad=67108864",
    )
)


def allocator_environment(environment: Mapping[str, str], libc: str | None = None) -> dict[str, str]:
    """Return what to add to ``environment`` so that large tensors do not fault their pages in again and again.

    Nothing is added where the C library is not glibc, or where the user has set the variable.
    """
    if (libc if libc is not None else platform.libc_ver()[0]) != "glibc" or ALLOCATOR_VARIABLE in environment:
        return {}
    return {ALLOCATOR_VARIABLE: ALLOCATOR_SETTINGS}


def restart_with_tuned_allocator() -> None:
    """Replace this process by itself with a tuned allocator, if it is not tuned already.

    Call it before anything is done that must not be done twice. Results do not change, only the speed does.
    """
    added = allocator_environment(os.environ)
    if added:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **added})  # noqa: S606


class StopSignal:
    """While this context is open, SIGINT and SIGTERM ask for a stop instead of causing one.

    The training loop finishes its step, saves, and leaves. A second signal changes nothing, so an impatient Ctrl-C
    cannot cut the save short. SIGHUP is ignored: a run outlives the terminal that started it. Signals can only be
    caught in the main thread; elsewhere the context does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Tell whether a signal arrived."""
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
