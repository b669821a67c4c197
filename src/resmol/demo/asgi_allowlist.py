"""ASGI middleware in front of Gradio that passes the requests of an allowlist and rejects all others.

Gradio offers some sixty routes: files, uploads, proxies, streams, monitoring. The page needs twelve. Any other gets 404
here, so that a hole in a route that the page does not use is no hole in the demo.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from resmol.demo.request_limits import FIELDS, Limits, problems
from resmol.demo.sessions import Sessions

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

JOIN, DATA = "/gradio_api/queue/join", "/gradio_api/queue/data"
CANCEL, RESET = "/gradio_api/cancel", "/gradio_api/reset"  # the page calls both when Stop is pressed
_READ = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json"
    r"|/(assets|static)/[\w@-][\w.@-]*(/[\w@-][\w.@-]*)*"
    r"|/gradio_api/(startup-events|queue/data|heartbeat/[a-z0-9]{1,32})",
    re.ASCII,
)
_SESSION = re.compile(r"[a-z0-9]{1,32}", re.ASCII)
_MAX_QUERY = 512
# Gradio's page starts with scripts inside it and compiles its templates; nothing may come from elsewhere.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors "
)


@dataclass(frozen=True)
class Rejected(Exception):
    """A request that is not on the allowlist: the HTTP status of the answer, and its JSON ``detail``."""

    status: int
    detail: object


class Allowlist:
    """Passes the requests of the page to Gradio and rejects all others.

    Args:
        inner: Gradio's application.
        limits: What a request may hold.
        generate: The number of the page's one function.
        sessions: The sessions and their listeners.
        hosts: Host names that the page is served under; empty allows all. They keep a page on the network from reaching
            a demo on this machine under a name of its own (DNS rebinding).
        embedded: Whether huggingface.co may show the page in a frame.
    """

    def __init__(
        self, inner: Application, limits: Limits, generate: int, sessions: Sessions, *,
        hosts: Iterable[str] = (), embedded: bool = False,
    ) -> None:  # fmt: skip
        self._inner, self._limits, self._generate, self._sessions = inner, limits, generate, sessions
        self._hosts = frozenset(hosts)
        ancestors = "https://huggingface.co https://*.hf.space" if embedded else "'none'"
        self._headers = [
            (b"content-security-policy", (_POLICY + ancestors).encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        if scope["type"] == "lifespan":
            await self._inner(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # uvicorn rejects a websocket that is not accepted
        try:
            self._check_target(scope)
            if scope["method"] == "POST":
                await self._post(scope, receive, send)
            elif scope["path"] == DATA:
                with self._sessions.listener(_stream_session(scope["query_string"])):
                    await self._inner(scope, receive, self._with_headers(send))
            else:
                await self._inner(scope, receive, self._with_headers(send))
        except Rejected as rejected:
            await self._reject(rejected, send)

    def _check_target(self, scope: Scope) -> None:
        method, path = scope["method"], scope["path"]
        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        if self._hosts and re.sub(r":\d+$", "", host) not in self._hosts:
            raise Rejected(403, "this demo is not served under that name")
        if len(scope["query_string"]) > _MAX_QUERY:
            raise Rejected(414, "the address is too long")
        allowed = ("POST",) if path in (JOIN, CANCEL, RESET) else ("GET", "HEAD") if _READ.fullmatch(path) else ()
        if not allowed:
            raise Rejected(404, "there is no such page")
        if method not in allowed:
            raise Rejected(405, f"{method} is not possible here")

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._body(scope, receive)
        if scope["path"] == JOIN:
            session = check_join(body, self._generate, self._limits)
            if not await self._sessions.join(session):
                raise Rejected(503, "too many requests have no listener; try again in a few seconds")
        else:
            check_cancel(body)
        await self._inner(scope, _replay(body, receive), self._with_headers(send))

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Return the body, of which never more is held than the limit."""
        limit = self._limits.body_bytes
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not announced.isdigit() or len(announced) > 12 or int(announced) > limit:
            raise Rejected(413, f"a request may have {limit:,} bytes")
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise Rejected(413, f"a request may have {limit:,} bytes")
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Rejected(408, "the request did not arrive in time") from None

    def _with_headers(self, send: Send) -> Send:
        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *self._headers]}
            await send(message)

        return sending

    async def _reject(self, rejected: Rejected, send: Send) -> None:
        body = json.dumps({"detail": rejected.detail}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),  # what is left of a rejected body is not read
        ]
        await self._with_headers(send)({"type": "http.response.start", "status": rejected.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def check_join(body: bytes, generate: int, limits: Limits) -> str:
    """Return the session of a request for a text.

    Raises:
        Rejected: 400 when the page sends no such request; 422 with one verdict for each field, which the page shows
            beside the field, when a value is outside the limits.
    """
    request = _object(body)
    if unknown := request.keys() - {"data", "fn_index", "session_hash", "trigger_id", "event_data"}:
        raise Rejected(400, f"a request has no {min(unknown)[:40]!r}")
    _require_function(request, generate)
    for name in ("trigger_id", "event_data"):
        if not isinstance(request.get(name), int | None):
            raise Rejected(400, f"{name} must be a number or null")
    session, values = _session(request.get("session_hash")), request.get("data")
    if not isinstance(values, list) or len(values) != len(FIELDS):
        raise Rejected(400, f"data must be a list of {len(FIELDS)}: {', '.join(FIELDS)}")
    found = problems(values, limits)
    if any(found):
        raise Rejected(422, [{"is_valid": not problem, "message": problem} for problem in found])
    return session


def check_cancel(body: bytes) -> None:
    """Raise `Rejected` (400) when the page sends no such cancellation."""
    request = _object(body)
    if unknown := request.keys() - {"session_hash", "fn_index", "event_id"}:
        raise Rejected(400, f"a request has no {min(unknown)[:40]!r}")
    if not isinstance(request.get("event_id"), str | None) or not isinstance(request.get("fn_index"), int | None):
        raise Rejected(400, "event_id must be text, and fn_index a number")


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):  # a nesting of thousands of brackets included
        found = None
    if not isinstance(found, dict):
        raise Rejected(400, "the request is not a JSON object")
    return found


def _require_function(request: dict[str, Any], generate: int) -> None:
    number = request.get("fn_index")
    if isinstance(number, bool) or number != generate or not isinstance(number, int):
        raise Rejected(400, "there is no such function")


def _stream_session(query: bytes) -> str:
    """Return the session of a query string; of several, Gradio would take the last, so only one is allowed."""
    given = parse_qs(query.decode("latin-1"), keep_blank_values=True).get("session_hash", [])
    if len(given) > 1:
        raise Rejected(400, "session_hash is given more than once")
    return _session(given[0] if given else None)


def _session(given: object) -> str:
    if not isinstance(given, str) or not _SESSION.fullmatch(given):
        raise Rejected(400, "session_hash must be up to 32 letters and digits")
    return given


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a receive function that gives the body, which was read already, once more."""
    given = False

    async def replaying() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replaying
