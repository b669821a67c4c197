"""The record of a run: append-only JSON lines, each carrying the sha256 of the line before.

Every optimizer step is one line; the console, train.log, TensorBoard, plots and the report are views of it. A line
is `canonical` JSON, so that the hash of a line is the hash of its bytes. docs/ledger-format.md states what the chain
proves and what it cannot.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from resmol.errors import CheckFailed, DataError
from resmol.system.atomic_io import fsync_file, fsync_path, full_disk_is_an_error, write_durable

Kind = Literal["start", "step", "eval", "sample", "save", "resume", "rewind", "drift", "warn", "stop"]
Record = dict[str, Any]

GENESIS = "0" * 64
MAX_LINE_BYTES = 1_000_000
FORMAT = 2  # of version 0.2; version 0.1 wrote 1

# Fields without which a record cannot be read. A chain can be forged whole, so they are looked at like the rest.
_NEEDED: dict[str, dict[str, type]] = {
    "step": {"step": int},
    "eval": {"step": int, "loss": float},
    "rewind": {"from_step": int, "to_step": int},
    "save": {"step": int, "checkpoint": str, "manifest_sha256": str},
}


class LedgerTampered(CheckFailed):
    """The chain is broken: a line was changed, dropped, added, repeated or moved."""


def canonical(record: Record) -> bytes:
    """Return the one byte string that stands for a record (sorted keys, no spaces, ASCII, no NaN)."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def float_bits(value: float) -> str:
    """Return the 8 hexadecimal digits of the IEEE 754 single that ``value`` is: equality without a tolerance."""
    return struct.pack(">f", value).hex()


@dataclass(frozen=True)
class LedgerContent:
    """What a ledger file holds.

    Attributes:
        records: The records of the unbroken chain, oldest first.
        head: The sha256 of the last whole line (`GENESIS` when there is none).
        length: The bytes of the whole lines.
        torn: What a crash cut off: the bytes after the last newline, or all from a line on that holds zero bytes.
    """

    records: list[Record]
    head: str
    length: int
    torn: bytes


def read_ledger(path: Path) -> LedgerContent:
    """Read and verify a ledger.

    Raises:
        DataError: There is no such file.
        LedgerTampered: A whole line does not continue the chain; the message names the line.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no ledger at {path}", fix="name a run directory") from None
    return parse_ledger(content, path)


def parse_ledger(content: bytes, path: Path) -> LedgerContent:
    """Verify the content of a ledger file (`LedgerTampered`); ``path`` is named in errors."""
    # No line holds a zero byte. Where one begins, a power cut left a page unwritten, perhaps with later ones behind it.
    whole, newline, _ = content.partition(b"\0")[0].rpartition(b"\n")
    torn = content[len(whole) + len(newline) :]
    lines = whole.split(b"\n") if newline else []
    records, head = [], GENESIS
    for number, line in enumerate(lines, start=1):
        records.append(_parse_line(line, number, head, path))
        head = hashlib.sha256(line).hexdigest()
    return LedgerContent(records, head, len(content) - len(torn), torn)


def first_record(path: Path) -> Record | None:
    """Return the first record of a ledger, unverified; None where there is none that can be read."""
    try:
        with path.open("rb") as file:
            record = json.loads(file.readline(MAX_LINE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def unverified_kinds(path: Path) -> Iterator[str]:
    """Yield the kind of each whole line, unverified; an empty one for what is no record. No file has no lines."""
    try:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    try:
                        yield str(json.loads(line)["kind"])
                    except (ValueError, KeyError, TypeError, RecursionError):
                        yield ""
    except FileNotFoundError:
        return


def scan(path: Path, *kinds: Kind) -> Iterator[Record]:
    """Yield the records of some kinds, unverified and quickly; lines that cannot be read are passed over."""
    marks = [f'"kind":"{kind}"'.encode() for kind in kinds]  # quotes inside a text are escaped
    try:
        with path.open("rb") as file:
            for line in file:
                if any(mark in line for mark in marks):
                    with contextlib.suppress(ValueError, RecursionError):
                        yield json.loads(line)
    except FileNotFoundError:
        return


def _parse_line(line: bytes, number: int, head: str, path: Path) -> Record:
    try:
        record = json.loads(line)
        intact = isinstance(record, dict) and canonical(record) == line and _has_fields(record)
    except (ValueError, RecursionError):
        record, intact = {}, False
    if intact and record.get("seq") == number and record.get("prev") == head and record.get("kind") in get_args(Kind):
        return dict(record)
    reason = "does not carry the hash of the line before" if intact else "is not a canonical record"
    raise LedgerTampered(
        f"{path}, line {number} {reason}: the record was changed after it was written",
        fix="restore the file from a copy; nothing in it can be trusted from this line on",
    )


def _has_fields(record: Record) -> bool:
    needed = _NEEDED.get(str(record.get("kind")), {})
    return all(isinstance(record.get(name), kind) for name, kind in needed.items())


class Ledger:
    """The open end of a ledger; one process appends, under the run's lock.

    Opening verifies the whole chain. A torn last line (the write that a crash interrupted) is cut off and recorded
    as a ``warn`` record, unless it was the first. Whole lines behind the zeros of a power cut are cut off as well, and
    kept in a file beside the ledger. Anything else that is wrong stops with `LedgerTampered`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        is_new = not path.exists()
        content = LedgerContent([], GENESIS, 0, b"") if is_new else read_ledger(path)
        self.records = content.records
        self.head = content.head
        self._length = content.length
        self._file = path.open("ab", buffering=0)
        if is_new:
            fsync_path(path.parent)  # the name must survive a power cut as well, or checkpoints outlive their record
        if content.torn:
            if b"\n" in content.torn:  # more than one line; it may be evidence of something else than a crash
                write_durable(path.with_name(f"{path.name}.cut-at-{content.length}"), content.torn)
            os.ftruncate(self._file.fileno(), content.length)
            if content.records:  # otherwise there was nothing yet to record anything about: the first line is "start"
                digest = hashlib.sha256(content.torn).hexdigest()
                self.append("warn", what="torn last line removed", bytes=len(content.torn), sha256=digest)
            self.sync()

    def append(self, kind: Kind, **fields: Any) -> Record:
        """Add a record and return it. It survives the death of the process; `sync` makes it survive a power cut.

        Raises:
            DiskFull: The line could not be written whole; the part that was is taken back, and nothing was recorded.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        record: Record = {
            "seq": len(self.records) + 1,
            "prev": self.head,
            "time": now,
            "kind": kind,
            **fields,
        }
        line = canonical(record)
        with full_disk_is_an_error(self.path):
            self._write_whole(line + b"\n")
        self.head = hashlib.sha256(line).hexdigest()
        self.records.append(record)
        return record

    def _write_whole(self, line: bytes) -> None:
        """Write all of a line or none of it; a half would swallow the line that is appended after it."""
        remaining = memoryview(line)
        try:
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
        except OSError:
            with contextlib.suppress(OSError):  # if this fails too, the next start cuts the torn line off
                os.ftruncate(self._file.fileno(), self._length)
            raise
        self._length += len(line)

    def sync(self) -> None:
        """Flush to the disk.

        Raises:
            DataError: Another file, or none, lies where this one was opened: it is no longer the record of this place.
        """
        self._flush()
        try:
            is_here = os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            is_here = False
        if not is_here:
            raise DataError(
                f"{self.path} is not the file any more that this process writes: its directory was moved or removed",
                fix="run the same command on the directory where it lies now; nothing was written to the old place",
            )

    def close(self) -> None:
        """Flush and close."""
        try:
            self._flush()
        finally:
            self._file.close()

    def _flush(self) -> None:
        with full_disk_is_an_error(self.path):
            fsync_file(self._file.fileno())


class NullLedger(Ledger):
    """The ledger of a rank other than 0: it makes records and keeps none."""

    def __init__(self) -> None:
        self.records, self.head = [], GENESIS

    def append(self, kind: Kind, **fields: Any) -> Record:
        """Return the record."""
        return {"kind": kind, **fields}

    def sync(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def select(records: list[Record], kind: Kind) -> Iterator[Record]:
    """Yield the records of one kind, oldest first."""
    return (record for record in records if record["kind"] == kind)


def effective(records: list[Record], kind: Kind) -> dict[int, Record]:
    """Return the newest record of a kind for each step of the run's history: a rewind takes back what lies after it."""
    kept: dict[int, Record] = {}
    for record in records:
        if record["kind"] == "rewind":
            kept = {step: one for step, one in kept.items() if step <= record["to_step"]}
        elif record["kind"] == kind:
            kept[record["step"]] = record
    return kept


def effective_steps(records: list[Record]) -> dict[int, Record]:
    """Return the step records that make up the run's history."""
    return effective(records, "step")


def effective_saves(records: list[Record]) -> dict[str, Record]:
    """Return the save records of the run's history by the name of the checkpoint."""
    return {record["checkpoint"]: record for record in effective(records, "save").values()}


def last_fact(records: list[Record], name: str) -> Any:
    """Return the newest value of a field such as ``environment``, whichever kind of record has it; None without one."""
    return next((record[name] for record in reversed(records) if name in record), None)


def is_finished(records: list[Record], step: int) -> bool:
    """Return whether the last thing that was recorded is that a run finished at ``step``."""
    last = records[-1] if records else {}
    return (last.get("kind"), last.get("step"), last.get("reason")) == ("stop", step, "finished")


def ends_comparison(record: Record) -> bool:
    """Return whether steps after this record need not have the bits of those before it: machine or settings changed."""
    return record["kind"] == "drift" or (record["kind"] == "warn" and "environment" in record)


def comparable_steps(records: list[Record]) -> dict[int, Record]:
    """Return the newest execution of each step, taken back or not, since something changed that may change bits."""
    steps: dict[int, Record] = {}
    for record in records:
        if ends_comparison(record):
            steps = {}
        elif record["kind"] == "step":
            steps[record["step"]] = record
    return steps
