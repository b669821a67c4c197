"""What a user sees of long work: lines in a log at long intervals, a bar at a terminal, an end by Ctrl-C."""

from __future__ import annotations

import io
import threading

import pytest

from resmol.system import progress
from resmol.system.progress import Background, ProgressLines, byte_progress


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_a_line_every_half_minute_says_how_far_how_fast_and_how_long(messages: list[str]) -> None:
    clock = Clock()
    lines = ProgressLines("preparing", clock)
    for second in range(1, 75):
        clock.seconds = 100.0 + second
        lines.advance(second * 2_000_000, 1_200_000_000, f"{second} tokens")
    assert messages == [
        "preparing: 60.0 of 1,200.0 MB, 2.0 MB/s, 9:30 left, 0:30 so far, 30 tokens",
        "preparing: 120.0 of 1,200.0 MB, 2.0 MB/s, 9:00 left, 1:00 so far, 60 tokens",
    ]


def test_what_an_earlier_process_did_says_nothing_about_the_speed(messages: list[str]) -> None:
    clock = Clock()
    lines = ProgressLines("preparing", clock)
    clock.seconds += 30
    lines.advance(1_060_000_000, 1_200_000_000, "", kept=1_000_000_000)
    assert messages == ["preparing: 1,060.0 of 1,200.0 MB, 2.0 MB/s, 1:10 left, 0:30 so far"]


@pytest.mark.parametrize(
    ("done", "total", "expected"),
    [
        (0, None, "x: 1:15:00 so far"),
        (4_500_000_000, None, "x: 4,500.0 MB, 1.0 MB/s, 1:15:00 so far"),
        (10, 5, "x: 0.0 of 0.0 MB, 0.0 MB/s, 0:00 left, 1:15:00 so far"),
    ],
)
def test_what_is_not_known_is_left_out(messages: list[str], done: int, total: int | None, expected: str) -> None:
    clock = Clock()
    lines = ProgressLines("x", clock)
    clock.seconds += 4500
    lines.advance(done, total, "")
    assert messages == [expected]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_from_the_first_byte_on(monkeypatch: pytest.MonkeyPatch, messages: list[str]) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with byte_progress("preparing") as advance:
        advance(1_000_000, 4_000_000, "12,345 tokens")
    shown = stream.getvalue()
    assert "preparing" in shown
    assert "1.0/4.0 MB" in shown
    assert "12,345 tokens" in shown
    assert messages == []


def test_no_terminal_gets_no_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with byte_progress("preparing") as advance:
        advance(1, 2, "")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("CI", "true")
    assert not progress.is_live()


def test_waiting_gives_the_result_the_error_and_ctrl_c() -> None:
    assert Background(lambda: 7).wait(lambda: None) == 7
    with pytest.raises(ZeroDivisionError):
        Background(lambda: 1 // 0).wait(lambda: None)
    end = threading.Event()
    work = Background(lambda: end.wait(300))

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.wait(interrupt)
    assert work.is_alive
    end.set()
    work.leave(300.0)
    assert not work.is_alive
