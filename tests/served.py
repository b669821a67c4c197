"""A demo in a process of its own, as `resmol demo` starts it, and a client that sends what its page sends.

Run as a program it is that process: ``python served.py RUN DELAY PATIENCE COUNTER`` serves RUN on a free port, takes
DELAY seconds longer for each token, and appends a byte to COUNTER for each, so that a test can see what is being
computed. From the `FAST_TOKENS`-th token of an answer on it takes ten times DELAY: a test that stops a long answer need
not be quick. PATIENCE is `Limits.listener_seconds`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import waiting
from waiting import HANGS

DEFAULTS: list[Any] = ["ka lo mi", 8, 0.8, 0.95, 50, 0, False, 1.0]
JOIN, DATA = "/gradio_api/queue/join", "/gradio_api/queue/data"
FAST_TOKENS = 60


@dataclass(frozen=True)
class Served:
    """A running demo."""

    url: str
    pid: int
    counter: Path
    log: Path

    def tokens(self) -> int:
        """How many tokens were computed so far."""
        return self.counter.stat().st_size if self.counter.exists() else 0

    def resident_bytes(self) -> int:
        """The memory that the process holds."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def settle(self, quiet: float = 1.0, limit: float = HANGS) -> int:
        """Wait until nothing has been computed for a while; return the number of tokens."""
        deadline, seen, since = time.monotonic() + limit, self.tokens(), time.monotonic()
        while time.monotonic() - since < quiet:
            assert time.monotonic() < deadline, "it never stops"
            time.sleep(0.05)
            if self.tokens() != seen:
                seen, since = self.tokens(), time.monotonic()
        return seen


@contextmanager
def demo_process(command: list[str], folder: Path, *, cwd: Path | None = None, env: dict[str, str] | None = None,
                 wait: float = HANGS) -> Iterator[Served]:  # fmt: skip
    """Start a process that prints ``http://...`` when it serves; end it with the context."""
    log = folder / "demo.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=cwd, env=env or dict(os.environ))
    try:
        deadline = time.monotonic() + wait
        while (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text(errors="replace"))) is None:
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, "the demo does not start"
            time.sleep(0.05)
        served = Served(found[0], process.pid, folder / "tokens", log)
        until(lambda: httpx.get(f"{served.url}/config", timeout=HANGS).status_code == 200)
        yield served
    finally:
        process.terminate()
        process.wait(timeout=HANGS)


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds; a connection that is refused does not count as holding."""

    def holds_by_now() -> bool:
        try:
            return holds()
        except httpx.TransportError:
            return False

    waiting.until(holds_by_now, "it never came true")


def slow_demo(run: Path, folder: Path, delay: float = 0.0, patience: float = 5.0) -> Any:
    """Serve a run with ``delay`` more seconds for each token, and ``patience`` with those who do not listen."""
    words = [sys.executable, __file__, str(run), str(delay), str(patience), str(folder / "tokens")]
    return demo_process(words, folder)


def body(values: list[Any], session: str, **changes: Any) -> dict[str, Any]:
    """What the page sends when Generate is pressed."""
    return {"data": values, "fn_index": 0, "trigger_id": 13, "session_hash": session} | changes


def messages(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Read a stream of events."""
    for line in lines:
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def ask(url: str, values: list[Any] | None = None, session: str = "s1") -> list[dict[str, Any]]:
    """Ask for a continuation and listen to the end of it; return all messages."""
    with httpx.Client(base_url=url, timeout=HANGS) as client:
        answer = client.post(JOIN, json=body(DEFAULTS if values is None else values, session))
        assert answer.status_code == 200, answer.text
        with client.stream("GET", DATA, params={"session_hash": session}) as stream:
            found = []
            for message in messages(stream.iter_lines()):
                found.append(message)
                if message["msg"] in ("process_completed", "close_stream"):
                    break
            return found


def final_text(found: list[dict[str, Any]]) -> str:
    """Return the text that the last message leaves on the page."""
    last = [message for message in found if message["msg"] == "process_completed"][-1]
    assert last["success"], last
    return str(last["output"]["data"][0])


def main(run: str, delay: str, patience: str, counter: str) -> None:
    """Serve, slowly."""
    from resmol.__main__ import main as resmol
    from resmol.demo import server
    from resmol.demo.request_limits import Limits
    from resmol.interop.load import LoadedModel

    server.Limits = lambda: Limits(listener_seconds=float(patience))  # type: ignore[assignment, misc]

    stream, file = LoadedModel.stream, Path(counter).open("ab", buffering=0)  # noqa: SIM115 - until the process ends

    def slowly(self: Any, prompt: str, sampling: Any, *, on_token: Any = lambda _: None, **options: Any) -> Any:
        numbers = itertools.count()

        def counted(token: int) -> None:
            time.sleep(float(delay) * (1 if next(numbers) < FAST_TOKENS else 10))
            file.write(b".")
            on_token(token)

        return stream(self, prompt, sampling, on_token=counted, **options)

    LoadedModel.stream = slowly  # type: ignore[method-assign]
    resmol(["demo", run, "--port", "0"])


if __name__ == "__main__":
    main(*sys.argv[1:])
