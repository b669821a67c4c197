"""The standard streams: all three are there, they take every character, and nobody has to wait for their readers."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from typing import Any

PIECE = 1000  # characters written at once: at most 4000 bytes, which a pipe that has room takes whole
STOPPING = ("strict", "surrogateescape")  # what Python sets by default: a character that is not there is an error


def set_up_streams() -> None:
    """Make the standard streams of this process safe to write to."""
    open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in STOPPING and not has_all_characters(stream):
            stream.reconfigure(errors="replace")


def open_missing_streams() -> None:
    """Replace standard streams that are closed (`2>&-`) by ones into nothing.

    The next file to be opened would get the number of a closed one otherwise, and a library that writes its warnings
    to descriptor 2 would write them into the ledger.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the kernel gives the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")


def has_all_characters(stream: Any) -> bool:
    """Return whether a text stream's encoding has every character; that of a pipe on Windows does not."""
    return codecs.lookup(getattr(stream, "encoding", None) or "utf-8").name.startswith("utf")


def has_room(descriptor: int) -> bool:
    """Return whether a file takes PIPE_BUF = 4096 bytes at once (POSIX), or has an error to report.

    Windows does not say; there the answer is always yes, and a write may wait for its reader.

    Raises:
        OSError: The descriptor is not open.
    """
    if sys.platform == "win32":
        return True
    else:
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        return bool(poll.poll(0))


class LossyStream(io.TextIOBase):
    """A stream that drops what its reader does not take: a full pipe or a stopped terminal holds nothing up."""

    def __init__(self, stream: Any) -> None:  # whatever stands in for sys.stderr
        self._stream = stream

    def write(self, text: str, /) -> int:
        """Write what there is room for; return the length of the whole text."""
        for start in range(0, len(text), PIECE):
            if not self._has_room():
                break
            self._stream.write(text[start : start + PIECE])
            self._stream.flush()
        return len(text)

    def _has_room(self) -> bool:
        try:
            return has_room(self._stream.fileno())  # an error counts as room: the write then says what is wrong
        except (OSError, ValueError):
            return True  # not a file of the system, or closed

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return bool(self._stream.isatty())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"
