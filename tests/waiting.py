"""Waiting for a condition instead of for a time."""

from __future__ import annotations

import time
from collections.abc import Callable

HANGS = 300.0  # seconds after which a test gives up: so long that a busy machine is no reason


def until(holds: Callable[[], object], what: str, seconds: float = HANGS) -> None:
    """Return as soon as a condition holds; fail with ``what`` when it does not come true."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.01)
