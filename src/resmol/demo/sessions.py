"""Who listens to which answer, so that nothing is computed and kept for somebody who left.

Gradio keeps the messages of a session until they are fetched. A client that asks and never listens would let the
process grow without bound, and would be computed for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Queue(Protocol):
    """The part of Gradio's queue that is needed here."""

    pending_messages_per_session: Any
    pending_event_ids_session: Any

    async def clean_events(self, *, session_hash: str | None = None) -> None:
        """Give up what a session asked for."""


class Sessions:
    """Counts the listeners of each session and gives up sessions that have none.

    Args:
        queue: Gradio's.
        patience: Seconds that a session may be without a listener.
        most: Sessions without a listener that may exist at a time.
    """

    def __init__(self, queue: Queue, patience: float, most: int) -> None:
        self._queue, self._patience, self._most = queue, patience, most
        self._asked: set[str] = set()  # each of them has a listener or is in _silent_since, so it cannot grow either
        self._listeners: dict[str, int] = {}
        self._silent_since: dict[str, float] = {}

    async def join(self, session: str) -> bool:
        """Note that a session asks for something; False when there are too many that nobody listens to."""
        await self._give_up_silent()
        if session not in self._listeners:
            if len(self._silent_since) >= self._most and session not in self._silent_since:
                return False
            self._silent_since.setdefault(session, time.monotonic())
        self._asked.add(session)
        return True

    @contextmanager
    def listening(self, session: str) -> Iterator[None]:
        """Somebody listens to a session while this context is open.

        The end of it is noted only of a session that asked for something: others leave nothing behind that would have
        to be given up, and counting them would let a stranger who only listens shut everybody else out.
        """
        self._listeners[session] = self._listeners.get(session, 0) + 1
        self._silent_since.pop(session, None)
        try:
            yield
        finally:
            self._listeners[session] -= 1
            if not self._listeners[session]:
                del self._listeners[session]
                if session in self._asked:
                    self._silent_since[session] = time.monotonic()

    def has_listener(self, session: str) -> bool:
        """Tell whether somebody listens to a session, or may still begin to."""
        since = self._silent_since.get(session)
        return session in self._listeners or (since is not None and time.monotonic() - since < self._patience)

    async def _give_up_silent(self) -> None:
        now = time.monotonic()
        for session in [s for s, since in self._silent_since.items() if now - since >= self._patience]:
            if self._silent_since.pop(session, None) is None:
                continue  # while an earlier one was given up it was too, or somebody began to listen
            self._asked.discard(session)
            await self._queue.clean_events(session_hash=session)
            self._queue.pending_messages_per_session.pop(session, None)
            self._queue.pending_event_ids_session.pop(session, None)
