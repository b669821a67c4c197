"""Which sessions have a listener: the notes stay bounded, and no client can fill them up for others."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

import pytest

from resmol.demo.asgi_allowlist import DATA, Allowlist
from resmol.demo.request_limits import Limits
from resmol.demo.sessions import Sessions


class Queue:
    """As much of Gradio's as is needed."""

    def __init__(self) -> None:
        self.pending_messages_per_session: dict[str, Any] = {}
        self.pending_event_ids_session: dict[str, Any] = {}
        self.cleaned: list[str | None] = []

    async def clean_events(self, *, session_hash: str | None = None) -> None:
        self.cleaned.append(session_hash)


def listen(sessions: Sessions, session: str) -> None:
    with sessions.listener(session):
        pass


def test_listening_without_asking_leaves_nothing_and_shuts_nobody_out() -> None:
    sessions = Sessions(Queue(), patience=1e9, most=4)
    for number in range(100):
        listen(sessions, f"stranger{number}")
    assert sessions._idle_since == {}
    assert asyncio.run(sessions.join("visitor"))


def test_who_joined_and_left_is_given_up() -> None:
    queue = Queue()
    sessions = Sessions(queue, patience=0.0, most=4)
    assert asyncio.run(sessions.join("early"))
    listen(sessions, "early")
    with sessions.listener("late"):  # listens first, then asks
        assert asyncio.run(sessions.join("late"))
    assert queue.cleaned == ["early"]
    assert asyncio.run(sessions.join("visitor"))
    assert queue.cleaned == ["early", "late"]
    assert sessions._joined == {"visitor"}


def test_a_session_that_is_listened_to_while_others_are_given_up_stays() -> None:
    queue = Queue()
    sessions = Sessions(queue, patience=0.0, most=4)
    sessions._idle_since = {"first": 0.0, "second": 0.0}
    sessions._joined = {"first", "second"}

    with ExitStack() as listeners:

        async def clean_events(*, session_hash: str | None = None) -> None:
            queue.cleaned.append(session_hash)
            listeners.enter_context(sessions.listener("second"))

        queue.clean_events = clean_events  # type: ignore[method-assign]
        assert asyncio.run(sessions.join("visitor"))
        assert (queue.cleaned, sessions._joined) == (["first"], {"second", "visitor"})


def test_too_many_who_ask_and_never_listen_are_refused() -> None:
    sessions = Sessions(Queue(), patience=1e9, most=2)
    assert [asyncio.run(sessions.join(name)) for name in ("a", "b", "c", "a")] == [True, True, False, True]


@pytest.mark.parametrize("query", ["session_hash=a&session_hash=b", "session_hash=&session_hash=b",
                                   "session_hash=a&session%5Fhash=b", "session_hash=b&session_hash=", ""])  # fmt: skip
def test_one_session_is_listened_to(query: str) -> None:
    """Gradio takes the last of several, so that another one would be listened to than the allowlist checked."""
    passed: list[str] = []
    sent: list[Any] = []

    async def inner(scope: Any, _receive: Any, _send: Any) -> None:
        passed.append(scope["path"])

    async def send(message: Any) -> None:
        sent.append(message)

    allowlist = Allowlist(inner, Limits(), 0, Sessions(Queue(), 5.0, 4))
    scope = {"type": "http", "method": "GET", "path": DATA, "headers": [], "query_string": query.encode()}
    asyncio.run(allowlist(scope, send, send))
    assert (passed, sent[0]["status"]) == ([], 400)
    asyncio.run(allowlist(scope | {"query_string": b"session_hash=a"}, send, send))
    assert passed == [DATA]
