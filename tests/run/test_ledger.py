"""The ledger: the chain binds every byte, a torn tail is repaired and recorded, a full disk is said."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from resmol.errors import CheckFailed, DataError, DiskFull
from resmol.run.ledger import (
    GENESIS,
    Ledger,
    LedgerTampered,
    canonical,
    effective_steps,
    float_bits,
    read_ledger,
    select,
)


def small_ledger(path: Path, steps: int = 4) -> Path:
    ledger = Ledger(path)
    ledger.append("start", version="0.1.0", name="tiny")
    for step in range(1, steps + 1):
        ledger.append("step", step=step, loss=1 / step, loss_bits=float_bits(1 / step), windows="é☃")
    ledger.append("stop", step=steps, reason="finished")
    ledger.close()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return small_ledger(tmp_path / "ledger.jsonl")


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


# --- the chain ----------------------------------------------------------------------------------------------


def test_what_was_appended_is_read(path: Path) -> None:
    content = read_ledger(path)
    assert [record["kind"] for record in content.records] == ["start", *["step"] * 4, "stop"]
    assert [record["seq"] for record in content.records] == [1, 2, 3, 4, 5, 6]
    assert content.records[2]["windows"] == "é☃"
    assert (content.length, content.torn) == (path.stat().st_size, b"")


def test_each_line_carries_the_sha256_of_the_line_before(path: Path) -> None:
    head = GENESIS
    for line in path.read_bytes().splitlines():
        assert json.loads(line)["prev"] == head
        head = hashlib.sha256(line).hexdigest()
    assert read_ledger(path).head == head


def test_appending_goes_on_where_the_file_ends(path: Path) -> None:
    before = path.read_bytes()
    ledger = Ledger(path)
    ledger.append("resume", step=4, next_step=5)
    ledger.close()
    assert path.read_bytes().startswith(before)
    assert [record["seq"] for record in read_ledger(path).records] == [1, 2, 3, 4, 5, 6, 7]
    assert ledger.records == read_ledger(path).records
    assert ledger.head == read_ledger(path).head


def test_a_new_ledger_is_empty(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.jsonl").close()
    content = read_ledger(tmp_path / "ledger.jsonl")
    assert (content.records, content.head, content.length) == ([], GENESIS, 0)


def test_a_missing_ledger_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no ledger"):
        read_ledger(tmp_path / "ledger.jsonl")


# --- tampering ----------------------------------------------------------------------------------------------


def head_after(path: Path, content: bytes) -> str | None:
    """Return the head of a ledger with this content, or None where the chain is broken."""
    copy = path.with_name("copy.jsonl")
    copy.write_bytes(content)
    try:
        return read_ledger(copy).head
    except LedgerTampered:
        return None


def breaks_the_chain(path: Path, content: bytes) -> bool:
    return head_after(path, content) is None


@pytest.mark.parametrize("change", ["next bit", "high bit", "newline", "space", "digit", "deleted", "doubled"])
def test_every_edit_of_a_byte_is_noticed(tmp_path: Path, change: str) -> None:
    """The chain breaks, or, in the last line, ends in another head than the one that checkpoints hold."""
    path = small_ledger(tmp_path / "ledger.jsonl", steps=2)
    content, head = path.read_bytes(), read_ledger(path).head
    last_line = len(content) - len(lines_of(path)[-1])
    for position, byte in enumerate(content):
        new = {
            "next bit": bytes([byte ^ 1]),
            "high bit": bytes([byte ^ 0x80]),
            "newline": b"\n",
            "space": b" ",
            "digit": b"7",
            "deleted": b"",
            "doubled": bytes([byte, byte]),
        }[change]
        edited = content[:position] + new + content[position + 1 :]
        if edited == content:
            continue
        found = head_after(path, edited)
        assert found != head, position
        if position < last_line - 1:  # behind it stands a line that carries the hash
            assert found is None, position


@pytest.mark.parametrize("dropped", range(5))
def test_a_dropped_line_breaks_the_chain(path: Path, dropped: int) -> None:
    lines = lines_of(path)
    assert breaks_the_chain(path, b"".join(lines[:dropped] + lines[dropped + 1 :]))


@pytest.mark.parametrize("repeated", range(6))
def test_a_repeated_line_breaks_the_chain(path: Path, repeated: int) -> None:
    lines = lines_of(path)
    assert breaks_the_chain(path, b"".join([*lines[: repeated + 1], lines[repeated], *lines[repeated + 1 :]]))


def test_every_other_order_breaks_the_chain(path: Path) -> None:
    lines = lines_of(path)
    for order in itertools.permutations(lines):
        if list(order) != lines:
            assert breaks_the_chain(path, b"".join(order))


def test_a_line_from_another_run_breaks_the_chain(path: Path, tmp_path: Path) -> None:
    other = lines_of(small_ledger(tmp_path / "other.jsonl", steps=5))
    for number, line in enumerate(lines_of(path)):
        if number:
            lines = lines_of(path)
            assert breaks_the_chain(path, b"".join([*lines[:number], other[number], *lines[number + 1 :]])), line


def test_a_cut_at_the_end_changes_the_head(path: Path) -> None:
    """A shorter chain is sound: only the head that a checkpoint holds tells (docs/ledger-format.md)."""
    shorter = b"".join(lines_of(path)[:-1])
    assert head_after(path, shorter) not in (None, read_ledger(path).head)


def forged(changes: dict[str, object], drop: str = "") -> bytes:
    """Return a single first line that is sound but for the changes."""
    record = {"seq": 1, "prev": GENESIS, "time": "2026-01-01T00:00:00.000+00:00", "kind": "start"} | changes
    record.pop(drop, None)
    return canonical(record) + b"\n"


def test_the_forgery_without_a_change_is_sound(tmp_path: Path) -> None:
    assert not breaks_the_chain(tmp_path / "ledger.jsonl", forged({}))


@pytest.mark.parametrize(
    "line",
    [
        forged({"seq": 2}),
        forged({"seq": "1"}),
        forged({"prev": "1" * 64}),
        forged({"kind": "bogus"}),
        forged({"kind": ["start"]}),
        forged({}, drop="seq"),
        forged({}, drop="prev"),
        forged({}, drop="kind"),
        b"[]\n",
        b"null\n",
        b"\n",
        b"{}\n",
        b"\xff\n",
        b"[" * 100_000 + b"\n",
        forged({"loss": 1.5}).replace(b"1.5", b"NaN"),
        forged({"loss": 1.5}).replace(b"1.5", b"1.50"),
        forged({"loss": 1.5}).replace(b'"loss":1.5', b'"loss":1.5,"loss":2.5'),
        forged({"loss": 1.5}).replace(b'"loss":1.5', b'"loss":2.5,"loss":1.5'),
        forged({}).replace(b",", b", "),
        forged({}).replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + forged({}),
    ],
)
def test_a_line_that_is_no_record_of_ours_is_refused(line: bytes, tmp_path: Path) -> None:
    assert breaks_the_chain(tmp_path / "ledger.jsonl", line)


def test_a_broken_chain_is_a_failed_check() -> None:
    assert issubclass(LedgerTampered, CheckFailed)


def test_the_message_names_the_line(path: Path) -> None:
    lines = lines_of(path)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"step":2', b'"step":9'), *lines[3:]]))
    with pytest.raises(LedgerTampered, match="line 4 does not carry the hash of the line before"):
        read_ledger(path)


def test_a_broken_chain_cannot_be_appended_to(path: Path) -> None:
    content = path.read_bytes().replace(b'"step":2', b'"step":9')
    path.write_bytes(content)
    with pytest.raises(LedgerTampered):
        Ledger(path)
    assert path.read_bytes() == content


# --- torn tail ----------------------------------------------------------------------------------------------


def test_every_torn_tail_is_cut_off_and_recorded(path: Path) -> None:
    content = path.read_bytes()
    start = len(content) - len(lines_of(path)[-1])
    sound = read_ledger(path).records[:-1]
    for end in range(start + 1, len(content)):
        path.write_bytes(content[:end])
        assert read_ledger(path).torn == content[start:end]
        Ledger(path).close()
        repaired = read_ledger(path)
        assert repaired.records[:-1] == sound
        assert repaired.torn == b""
        warning = repaired.records[-1]
        assert warning["kind"] == "warn"
        assert warning["bytes"] == end - start
        assert warning["sha256"] == hashlib.sha256(content[start:end]).hexdigest()


def test_a_torn_first_line_leaves_an_empty_ledger(path: Path) -> None:
    """Otherwise the record of the repair would be the first line, where every reader expects the start."""
    path.write_bytes(lines_of(path)[0][:-10])
    Ledger(path).close()
    assert path.read_bytes() == b""


def test_zeros_of_a_power_cut_are_a_torn_end_and_lines_behind_them_are_kept(path: Path) -> None:
    lines = lines_of(path)
    behind = b"\0" * len(lines[3]) + b"".join(lines[4:])
    path.write_bytes(b"".join(lines[:3]) + behind)
    assert read_ledger(path).torn == behind
    length = sum(map(len, lines[:3]))
    Ledger(path).close()
    assert path.with_name(f"ledger.jsonl.cut-at-{length}").read_bytes() == behind
    assert [record["kind"] for record in read_ledger(path).records] == ["start", "step", "step", "warn"]


def test_a_whole_ledger_is_not_touched_by_opening(path: Path) -> None:
    content = path.read_bytes()
    Ledger(path).close()
    assert path.read_bytes() == content


# --- a disk that says no ------------------------------------------------------------------------------------


def test_a_full_disk_is_said() -> None:
    ledger = Ledger.__new__(Ledger)
    ledger.path, ledger.records, ledger.head, ledger._length = Path("/dev/full"), [], GENESIS, 0
    with (
        Path("/dev/full").open("ab", buffering=0) as ledger._file,
        pytest.raises(DiskFull, match="/dev/full"),
    ):
        ledger.append("start")
    assert (ledger.records, ledger.head) == ([], GENESIS)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("room", [0, 1, 50, 100])
def test_a_line_without_room_is_not_half_written(path: Path, room: int) -> None:
    """What fits is written first (a short write); it must not stay, or it would swallow the next line."""
    ledger = Ledger(path)
    ledger.append("resume", step=4, next_step=5)
    before, head = path.read_bytes(), ledger.head
    with largest_file(len(before) + room), pytest.raises(DiskFull, match="not written"):
        ledger.append("step", step=5, loss=0.2)
    assert path.read_bytes() == before
    assert ledger.head == head
    ledger.append("warn", what="there is room again")
    ledger.close()
    assert [record["kind"] for record in read_ledger(path).records[-2:]] == ["resume", "warn"]


def test_short_writes_are_completed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(path)

    class OneByteAtATime:
        def __init__(self, file: object) -> None:
            self.file = file

        def write(self, data: memoryview) -> int:
            return self.file.write(data[:1])  # type: ignore[attr-defined, no-any-return]

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    monkeypatch.setattr(ledger, "_file", OneByteAtATime(ledger._file))
    ledger.append("warn", what="slow")
    ledger.close()
    assert read_ledger(path).records[-1]["what"] == "slow"


def test_a_record_with_a_number_that_is_none_is_refused(path: Path) -> None:
    ledger = Ledger(path)
    with pytest.raises(ValueError, match="JSON compliant"):
        ledger.append("step", step=5, loss=float("nan"))
    ledger.append("warn", what="non-finite")
    ledger.close()
    assert len(read_ledger(path).records) == 7


def test_appends_reach_the_kernel_at_once(path: Path) -> None:
    """A killed process loses nothing that it appended: another reader sees it without a flush."""
    ledger = Ledger(path)
    ledger.append("warn", what="before the kill")
    assert read_ledger(path).records[-1]["what"] == "before the kill"
    ledger.close()


def test_sync_flushes_and_a_new_file_is_entered_in_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
    )
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert synced == [tmp_path.name]
    ledger.append("start")
    ledger.sync()
    assert synced == [tmp_path.name, "ledger.jsonl"]
    ledger.close()
    Ledger(tmp_path / "ledger.jsonl").close()
    assert synced[2:] == ["ledger.jsonl", "ledger.jsonl"]


# --- reading the record -------------------------------------------------------------------------------------


@given(st.floats(width=32))
@example(-0.0)
@example(5e-324)
def test_float_bits_are_those_of_the_single(value: float) -> None:
    assert float_bits(value) == np.float32(value).tobytes()[::-1].hex()


def test_float_bits_tell_neighbours_apart() -> None:
    (above,) = struct.unpack(">f", bytes.fromhex("3f800001"))
    assert (float_bits(1.0), float_bits(above)) == ("3f800000", "3f800001")


def test_select_keeps_the_order() -> None:
    records = [{"kind": "step", "step": 1}, {"kind": "eval", "step": 1}, {"kind": "step", "step": 2}]
    assert [record["step"] for record in select(records, "step")] == [1, 2]
    assert list(select(records, "save")) == []


def test_a_rewind_takes_steps_back() -> None:
    def step(number: int, attempt: int) -> dict[str, object]:
        return {"kind": "step", "step": number, "attempt": attempt}

    records = [*(step(n, 1) for n in range(1, 8)), {"kind": "rewind", "from_step": 7, "to_step": 5}]
    assert sorted(effective_steps(records)) == [1, 2, 3, 4, 5]
    records += [step(n, 2) for n in (6, 7, 8)]
    assert [record["attempt"] for record in effective_steps(records).values()] == [1, 1, 1, 1, 1, 2, 2, 2]
    records += [{"kind": "rewind", "from_step": 8, "to_step": 0}, step(1, 3)]
    assert [record["attempt"] for record in effective_steps(records).values()] == [3]
