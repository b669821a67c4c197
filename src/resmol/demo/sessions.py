"""Which sessions have a listener, so that nothing is computed or kept for a client that left.

Gradio keeps the messages of a session until they are fetched. A client that asks and never fetches would let the
process grow without bound, and cost computation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Queue(Protocol):
    """The part of Gradio's queue that `Sessions` needs."""

    pending_messages_per_session: Any
    pending_event_ids_session: Any

    async def clean_events(self, *, session_hash: str | None = None) -> None:
        """Cancel the events of a session."""


def gradio_queue(blocks: Any) -> Queue:
    """Return the queue of a page: the only place where resmol uses a private part of Gradio.

    Gradio 6 has no public way to drop a session that has no listener: its cancel route needs the id of an event, its
    unload event needs an open connection, and neither frees messages that were never fetched.
    """
    queue = blocks._queue
    assert isinstance(queue, Queue), "this version of Gradio has another queue than Gradio 6"
    return queue


class Sessions:
    """Counts the listeners of each session and drops sessions that have none.

    Args:
        queue: Gradio's.
        patience: Seconds that a session may be without a listener.
        most: Sessions without a listener that may exist at a time.
    """

    def __init__(self, queue: Queue, patience: float, most: int) -> None:
        self._queue, self._patience, self._most = queue, patience, most
        self._joined: set[str] = set()  # each of them has a listener or is in _idle_since, so it cannot grow either
        self._listeners: dict[str, int] = {}
        self._idle_since: dict[str, float] = {}

    async def join(self, session: str) -> bool:
        """Note that a session asks for something; return False when too many have no listener."""
        await self._drop_idle()
        if session not in self._listeners:
            if len(self._idle_since) >= self._most and session not in self._idle_since:
                return False
            self._idle_since.setdefault(session, time.monotonic())
        self._joined.add(session)
        return True

    @contextmanager
    def listener(self, session: str) -> Iterator[None]:
        """Count a listener of a session while this context is open.

        Its end is noted only of a session that joined: others leave nothing behind that would have to be dropped, and
        counting them would let a stranger who only listens shut everybody else out.
        """
        self._listeners[session] = self._listeners.get(session, 0) + 1
        self._idle_since.pop(session, None)
        try:
            yield
        finally:
            self._listeners[session] -= 1
            if not self._listeners[session]:
                del self._listeners[session]
                if session in self._joined:
                    self._idle_since[session] = time.monotonic()

    def has_listener(self, session: str) -> bool:
        """Return whether a session has a listener, or may still get one."""
        since = self._idle_since.get(session)
        return session in self._listeners or (since is not None and time.monotonic() - since < self._patience)

    async def _drop_idle(self) -> None:
        now = time.monotonic()
        for session in [s for s, since in self._idle_since.items() if now - since >= self._patience]:
            if self._idle_since.pop(session, None) is None:
                continue  # while an earlier one was dropped it was too, or it got a listener
            self._joined.discard(session)
            await self._queue.clean_events(session_hash=session)
            self._queue.pending_messages_per_session.pop(session, None)
            self._queue.pending_event_ids_session.pop(session, None)
