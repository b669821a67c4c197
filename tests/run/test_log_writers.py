"""What is shown: the right lines, aligned; and a log writer that fails never stops the run."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from tiny import TrainTiny, step_record

from resmol.run.console import ConsoleWriter
from resmol.run.directory import RunDir
from resmol.run.ledger import Ledger, Record, read_ledger, select
from resmol.run.log_writers import RunLog, StepFormatter, TextLogWriter, describe


def steps_shown(lines: StepFormatter, first: int, last: int) -> list[int]:
    return [step for step in range(first, last + 1) if lines.line({"kind": "step", **step_record(step)})]


def test_which_steps_get_a_line() -> None:
    assert steps_shown(StepFormatter(500, 5000), 1, 5000) == [1, *range(500, 5001, 500)]
    assert steps_shown(StepFormatter(500, 5050), 5001, 5050) == [5001, 5050]


def test_speed_is_that_of_all_steps_since_the_last_line() -> None:
    lines = StepFormatter(10, 20)
    lines.line({"kind": "step", **step_record(1)})
    for step in range(2, 10):
        lines.line({"kind": "step", **step_record(step), "seconds": 0.02})
    assert "   3,388 tok/s" in (lines.line({"kind": "step", **step_record(10)}) or ""), (
        "9 x 64 tokens in 8 x 0.02 + 0.01 s"
    )


def test_lines_align() -> None:
    lines = StepFormatter(1, 5050)
    texts = [lines.line({"kind": "step", **step_record(step)}) or "" for step in (1, 20, 5000)]
    assert len({text.index("| loss") for text in texts}) == 1
    assert len({text.index("tok/s") for text in texts}) == 1


def test_every_kind_has_words(tmp_path: Path, train_tiny: TrainTiny) -> None:
    for steps in (20, 21):
        train_tiny(tmp_path / "run", steps)
    for record in read_ledger(tmp_path / "run" / "ledger.jsonl").records:
        assert record["kind"] == "step" or describe(record)
    assert (
        describe({"kind": "resume", "step": 5000, "next_step": 5001})
        == "resume: step 5000 verified, continuing at step 5001"
    )


def test_train_log_goes_on_after_a_resume(tmp_path: Path, train_tiny: TrainTiny) -> None:
    run = RunDir(tmp_path / "run")
    for steps in (20, 25):
        train_tiny(run.path, steps, progress=True)
    shown = [line.split()[1] for line in run.log.read_text().splitlines() if line.startswith("step ")]
    assert shown == ["1/20", "10/20", "20/20", "21/25", "25/25"]


class Broken:
    """A log writer whose device is gone."""

    def __init__(self, error: Exception) -> None:
        self.error, self.calls = error, 0

    def show(self, _record: Record) -> None:
        self.calls += 1
        raise self.error

    def close(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "full"), ValueError("I/O operation on closed file")])
def test_a_broken_log_writer_is_disabled_once(tmp_path: Path, error: Exception) -> None:
    writer, ledger = Broken(error), Ledger(tmp_path / "ledger.jsonl")
    run_log = RunLog(ledger, [writer])
    for step in (1, 2, 3):
        run_log.write("step", **step_record(step))
    run_log.close()
    records = read_ledger(tmp_path / "ledger.jsonl").records
    assert [record["kind"] for record in records] == ["step", "warn", "step", "step"]
    assert records[1]["what"] == "Broken disabled"
    assert writer.calls == 1


@pytest.mark.parametrize("target", ["/dev/full", "closed"])
def test_a_full_or_closed_stream(tmp_path: Path, train_tiny: TrainTiny, target: str) -> None:
    path = Path("/dev/full") if target == "/dev/full" else tmp_path / "closed"
    stream = path.open("w")
    if target == "closed":
        stream.close()
    state = train_tiny(tmp_path / "run", 3, log_writers=lambda _: [ConsoleWriter(StepFormatter(1, 3), stream)])
    assert state.step == 3
    warnings = list(select(read_ledger(tmp_path / "run" / "ledger.jsonl").records, "warn"))
    assert len(warnings) == 1
    with suppress(OSError):
        stream.close()


def test_a_broken_pipe_does_not_end_training(tmp_path: Path, train_tiny: TrainTiny) -> None:
    """As in `resmol train ... 2>&1 | head -1`; rich would answer with SystemExit, and nothing would be saved."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w", buffering=1)
    state = train_tiny(tmp_path / "run", 3, log_writers=lambda _: [ConsoleWriter(StepFormatter(1, 3), stream)])
    with suppress(OSError):
        stream.close()
    assert state.step == 3
    warnings = list(select(read_ledger(tmp_path / "run" / "ledger.jsonl").records, "warn"))
    assert [record["reason"] for record in warnings] == ["BrokenPipeError"]


def test_a_full_pipe_is_not_waited_for(tmp_path: Path, train_tiny: TrainTiny) -> None:
    """A reader that sleeps: its pipe takes 64 KiB, then nothing. Training ends all the same."""
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w", buffering=1)
    with suppress(BlockingIOError):  # fill it
        os.set_blocking(writing, False)
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    state = train_tiny(tmp_path / "run", 3, log_writers=lambda _: [ConsoleWriter(StepFormatter(1, 3), stream)])
    assert state.step == 3
    os.set_blocking(reading, False)
    assert set(os.read(reading, 1 << 20)) == {0}
    os.close(reading)
    with suppress(OSError):
        stream.close()


def test_a_slow_reader_loses_lines_and_no_halves(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", buffering=1) as stream:
        view = ConsoleWriter(StepFormatter(1, 10_000), stream)
        for step in range(1, 3000):
            view.show({"kind": "step", **step_record(step)})
        os.set_blocking(reading, False)
        lines = os.read(reading, 1 << 20).decode().splitlines()
    os.close(reading)
    assert 100 < len(lines) < 2999
    assert all(line.startswith("step") for line in lines)


def test_a_log_on_a_full_disk(tmp_path: Path) -> None:
    run_log = RunLog(Ledger(tmp_path / "ledger.jsonl"), [TextLogWriter(Path("/dev/full"), StepFormatter(1, 2))])
    run_log.write("step", **step_record(1))
    run_log.write("step", **step_record(2))
    run_log.close()
    assert sum(1 for _ in select(read_ledger(tmp_path / "ledger.jsonl").records, "warn")) == 1


SHOW = """
import sys
from resmol.run.console import ConsoleWriter
from resmol.run.log_writers import StepFormatter
view = ConsoleWriter(StepFormatter(2, 4))
for step in range(1, 5):
    numbers = {"loss": 1.5, "grad_norm": 1.0, "lr": 1e-3, "tokens": 64, "tokens_seen": 64, "epoch": 0.0, "seconds": 0.1}
    view.show({"kind": "step", "step": step, **numbers})
view.close()
"""


def shown_on_a_terminal(**environment: str) -> str:
    """Run the view in a process whose standard error is a terminal, and return what it wrote there."""
    main, side = pty.openpty()
    variables = {key: value for key, value in os.environ.items() if key not in ("CI", "NO_COLOR")} | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", SHOW], stderr=side, env=variables | environment)
    os.close(side)
    out = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:
            break
        if not chunk:
            break
        out += chunk
    os.close(main)
    assert process.wait() == 0
    return out.decode()


def test_a_terminal_gets_a_live_line_and_others_do_not() -> None:
    live = shown_on_a_terminal()
    assert "1/4" in live
    assert "\x1b[" in live
    assert live.count("step ") >= 3
    plain = shown_on_a_terminal(CI="true")
    assert "\x1b[2K" not in plain
    assert plain.count("step ") == 3


def test_where_there_is_no_live_line_silence_is_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [0.0]
    monkeypatch.setattr("resmol.run.console.time.monotonic", lambda: now[0])
    with (tmp_path / "out").open("w+") as stream:
        view = ConsoleWriter(StepFormatter(500, 1000), stream)
        for step in range(1, 101):
            now[0] += 1.0
            view.show({"kind": "step", **step_record(step)})
        stream.seek(0)
        lines = stream.read().splitlines()
    assert [line.split()[1] for line in lines] == ["1/1000", "32/1000", "63/1000", "94/1000"]
    assert lines[-1].endswith("| 15:06 left")


# --- what a person sees -------------------------------------------------------------------------------------


def test_a_step_fits_the_width_it_is_given() -> None:
    record = {"kind": "step", **step_record(5000), "tokens_seen": 81_920_000, "epoch": 12.34}
    full = StepFormatter(1, 5050).line(record) or ""
    for width in (60, 72, 80, 100, 120):
        text = StepFormatter(1, 5050).line(record, width=width) or ""
        assert len(text) <= width
        assert set(text.split(" | ")) <= set(full.split(" | "))
        assert all(word in text for word in ("step 5000/5050", "loss", "lr ", "tok/s"))
    assert StepFormatter(1, 5050).line(record, width=120) == full
    assert len(full) > 80


def test_lines_at_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    main, side = pty.openpty()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    sample = {"kind": "sample", "step": 5, "prompt": "Once ", "text": "upon a time " * 12 + "\nthere was 漢字" * 9}
    with os.fdopen(side, "w") as stream:
        writer = ConsoleWriter(StepFormatter(1, 5050), stream)
        writer.show({"kind": "step", **step_record(5000), "tokens_seen": 81_920_000})
        writer.show(sample)
        writer.close()
        lines = [line.rstrip("\r") for line in os.read(main, 1 << 16).decode().split("\n")]
    os.close(main)
    step, title, *body = [line for line in lines if line]
    assert step.startswith("step 5000/5050 | loss")
    assert title == "sample at step 5:"
    assert all(line.startswith("    | ") and len(line) <= 80 for line in body)
    joined = "".join(line.removeprefix("    | ").replace(" ", "") for line in body)
    assert joined == (sample["prompt"] + str(sample["text"])).replace(" ", "").replace("\n", "")


class Shell:
    """What IPython in a kernel looks like from outside."""

    kernel = None


class Display:
    """Stands for IPython: what it displays, and the pictures that replace it."""

    def __init__(self) -> None:
        self.pictures: list[str] = []

    def get_ipython(self) -> Shell:
        return Shell()

    def HTML(self, text: str) -> str:
        return text

    def display(self, picture: str, *, display_id: bool) -> Display:
        assert display_id
        self.pictures.append(picture)
        return self

    update = property(lambda self: self.pictures.append)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Display:
    shown = Display()
    monkeypatch.setitem(sys.modules, "IPython", shown)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "IPython.display", shown)  # type: ignore[arg-type]
    return shown


@pytest.mark.usefixtures("as_a_library")
def test_a_notebook_sees_a_bar_and_lines_without_carriage_returns(
    notebook: Display, tmp_path: Path, train_tiny: TrainTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tiny(tmp_path / "run", 20)
    printed = capsys.readouterr().out
    assert "\r" not in printed
    assert "\x1b" not in printed
    assert "step 10/20 | loss" in printed
    assert "data: " in printed  # a message of the package
    assert notebook.pictures[0].startswith('<progress value="0" max="20">')
    assert "step 20 of 20 loss" in notebook.pictures[-1]
    train_tiny(tmp_path / "run", 25, progress=False)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("as_a_library")
def test_a_library_is_silent_unless_it_is_asked(
    tmp_path: Path, train_tiny: TrainTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tiny(tmp_path / "run", 3)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    assert "step 3/3" in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    train_tiny(tmp_path / "run", 6, progress=True)
    err = capsys.readouterr().err
    assert "step 6/6" in err
    assert "data: " in err
    assert [handler for handler in logging.getLogger("resmol").handlers if type(handler) is logging.StreamHandler] == []
