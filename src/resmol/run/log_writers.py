"""Log writers: console, train.log and trackers show the records of the ledger and hold nothing of their own.

A log writer never stops training. If its terminal is gone, or its disk or pipe full, it is disabled, and a ``warn``
record says so once; only the ledger itself may raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from resmol.run.ledger import Kind, Ledger, Record
from resmol.run.trackers import TrackerError
from resmol.system.wording import counted, in_words

SAMPLE_INDENT = "    | "


@runtime_checkable
class LogWriter(Protocol):
    """Shows records as they are written."""

    def show(self, record: Record) -> None:
        """Show one record."""

    def close(self) -> None:
        """Finish."""


class RunLog:
    """The ledger together with its log writers: a record is appended first, then shown."""

    def __init__(self, ledger: Ledger, writers: Sequence[LogWriter]) -> None:
        self._ledger = ledger
        self._writers = list(writers)

    @property
    def records(self) -> list[Record]:
        """All records so far."""
        return self._ledger.records

    @property
    def head(self) -> str:
        """The sha256 of the last line."""
        return self._ledger.head

    def write(self, kind: Kind, **fields: Any) -> Record:
        """Append a record and show it; a log writer that fails is disabled, with a ``warn`` record."""
        record = self._ledger.append(kind, **fields)
        for writer in list(self._writers):
            try:
                writer.show(record)
            except (OSError, ValueError) as error:  # ValueError: the stream was closed
                self._writers.remove(writer)
                _close_quietly(writer)
                name = getattr(writer, "name", type(writer).__name__)
                reason = str(error) if isinstance(error, TrackerError) else type(error).__name__
                self.write("warn", what=f"{name} disabled", reason=reason)
        return record

    def sync(self) -> None:
        """Make everything written so far survive a power cut."""
        self._ledger.sync()

    def close(self) -> None:
        """Close the log writers, then the ledger."""
        for writer in self._writers:
            _close_quietly(writer)
        self._ledger.close()


def _close_quietly(writer: LogWriter) -> None:
    with suppress(OSError, ValueError):
        writer.close()


class StepFormatter:
    """Formats records as lines, and decides which steps get one.

    Args:
        every: Steps between lines.
        last: The last step of this invocation, which always gets one, as the first one does.
    """

    def __init__(self, every: int, last: int) -> None:
        self.every = every
        self.last = last
        self._first = True
        self._tokens, self._seconds = 0, 0.0

    def line(self, record: Record, *, force: bool = False, width: int | None = None) -> str | None:
        """Return the text of a record, or None for a step that is not shown.

        Args:
            record: The record.
            force: Show a step all the same.
            width: Leave out what is least asked for until a step fits so many columns; None leaves nothing out.
        """
        if record["kind"] != "step":
            return describe(record)
        self._tokens += record["tokens"]
        self._seconds += record["seconds"]
        due = force or self._first or record["step"] % self.every == 0 or record["step"] == self.last
        if not (due or record.get("skipped")):
            return None
        rate = self._tokens / self._seconds if self._seconds else 0.0
        self._first, self._tokens, self._seconds = False, 0, 0.0
        digits = len(str(self.last))
        parts = [
            f"step {record['step']:>{digits}}/{self.last}",
            f"loss {record['loss']:7.4f}",
            f"grad {_grad_norm(record)}",
            f"lr {record['lr']:.2e}",
            f"{rate:7,.0f} tok/s",
            f"{record['tokens_seen']:>11,} tokens",
            f"epoch {record['epoch']:.2f}",
        ]
        if record.get("skipped"):
            parts.append(f"skipped: overflow at loss scale {record['loss_scale']:g}")
        for dispensable in (parts[2], parts[5], parts[6]):  # gradient, tokens, epoch
            if width is not None and len(" | ".join(parts)) > width:
                parts.remove(dispensable)
        return " | ".join(parts)


def _grad_norm(record: Record) -> str:
    return "  none" if record["grad_norm"] is None else f"{record['grad_norm']:6.3f}"


def describe(record: Record) -> str | None:
    """Return a record other than a step in words; None for a step."""
    words = _DESCRIPTIONS.get(record["kind"])
    return words(record) if words else None


def _sample(record: Record) -> str:
    body = (record["prompt"] + record["text"]).strip("\n").replace("\r", "").split("\n")
    return f"sample at step {record['step']}:\n" + "\n".join(f"{SAMPLE_INDENT}{line}" for line in body)


def _start(record: Record) -> str:
    machine = record["environment"]
    size = f"{record['parameters']:,} parameters"
    return f"start: {record['name']}, {size}, {machine['device']}, {counted(machine['threads'], 'thread')}"


def _eval(record: Record) -> str:
    measured = f"held-out loss {record['loss']:.4f}, {record['bits_per_byte']:.4f} bits per byte"
    if "averaged_loss" in record:
        averaged = f"{record['averaged_loss']:.4f}, {record['averaged_bits_per_byte']:.4f}"
        measured += f"; averaged weights {averaged}"
    if "source_losses" in record:
        measured += f"; {', '.join(f'{name} {loss:.4f}' for name, loss in record['source_losses'].items())}"
    return f"eval at step {record['step']}: {measured} ({counted(record['tokens'], 'token')})"


def _save(record: Record) -> str:
    kept = ", permanent" if record["permanent"] else ""
    if record["step"] in record.get("best", {}).values():
        kept += ", best held-out loss so far"
    stalled = f" (training stalled for {record['stall_seconds']:.2f} s)"
    return f"save: {record['checkpoint']}, {record['bytes'] / 1e6:,.1f} MB in {record['seconds']:.2f} s{stalled}{kept}"


def _rewind(record: Record) -> str:
    first, last = record["to_step"] + 1, record["from_step"]
    return f"rewind: steps {first} to {last} were not saved and are executed again"


def _drift(record: Record) -> str:
    return f"drift accepted: {in_words(record['changes'])}"


def _warn(record: Record) -> str:
    details = {key: value for key, value in record.items() if key not in _NOT_SHOWN}
    changes = f" ({in_words(record['changes'])})" if "changes" in record else ""
    return f"warning: {record['what']}{changes}" + "".join(f", {key} {value}" for key, value in details.items())


_NOT_SHOWN = ("what", "seq", "prev", "time", "kind", "changes", "environment")  # of a warning: its frame, and tables

_DESCRIPTIONS: dict[str, Callable[[Record], str]] = {
    "start": _start,
    "eval": _eval,
    "sample": _sample,
    "save": _save,
    "resume": lambda r: f"resume: step {r['step']} verified, continuing at step {r['next_step']}",
    "rewind": _rewind,
    "drift": _drift,
    "warn": _warn,
    "stop": lambda r: f"stop: {r['reason']} at step {r['step']}",
}


class TextLogWriter:
    """Appends the lines to ``train.log``."""

    def __init__(self, path: Path, formatter: StepFormatter) -> None:
        self._file = path.open("a", encoding="utf-8", newline="\n", buffering=1)
        self._formatter = formatter

    def show(self, record: Record) -> None:
        """Append the record's line, if it has one."""
        text = self._formatter.line(record)
        if text is not None:
            self._file.write(text + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
