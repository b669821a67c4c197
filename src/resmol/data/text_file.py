"""One input file, from its bytes on the disk to its text: recognized, unpacked and decoded as it is read."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from resmol.data.chunking import InputCount, ReadCounts, repair, text_decoder, without_mark
from resmol.data.compression import (
    DAMAGE,
    PACKED_HEAD_BYTES,
    Unpacked,
    compression_of,
    unpacked_head,
    unpacked_name,
)
from resmol.data.csv_rows import csv_rows
from resmol.data.encodings import DecodingCheck, require_encoding
from resmol.data.format_signatures import TABLE_NAMES, TableKind, UnsupportedFormat
from resmol.data.formats import FORMATS, HEAD_BYTES, TEXT_KINDS, recognize
from resmol.data.json_lines import MAX_LINE_BYTES, Row, json_lines
from resmol.data.remote_files import RemoteFile
from resmol.data.tables import TableFile
from resmol.errors import DataError, UsageError
from resmol.system.byte_order_mark import marked_encoding

_READ_BYTES = 1 << 18

Stream = io.RawIOBase | io.BufferedIOBase


@dataclass(frozen=True)
class ReadOptions:
    """How to read inputs.

    Attributes:
        text_field: The field of a JSON line, or the column of a table, that holds the text; a dot leads into an
            object. Of several, separated by commas, the first that is there counts.
        encoding: Encoding of files without a byte order mark; bytes that it does not have are then replaced, however
            many they are. None is UTF-8, and refuses a file in which more than a few per cent would be.
        format: ``auto`` looks at content and name; the others of `FORMATS` say what every file of text is.
        include_hidden: Whether hidden files and folders in a folder are read.
        sample_seed: Draws the order of the files of an input, and of the row groups of a Parquet file; None leaves it.
    """

    text_field: str = "text"
    encoding: str | None = None
    format: str = "auto"
    include_hidden: bool = False
    sample_seed: int | None = None

    def __post_init__(self) -> None:
        require_encoding(self.encoding)
        if self.format not in FORMATS:
            raise UsageError(f"--format is {self.format!r}", fix=f"choose one of: {', '.join(FORMATS)}")


@contextmanager
def open_file(path: Path | RemoteFile) -> Iterator[io.RawIOBase]:
    """Open a file for `TextFile` (`DataError` where that fails)."""
    try:
        file = path.open() if isinstance(path, RemoteFile) else io.FileIO(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    with file:
        yield file


class TextFile:
    """An open file whose beginning has been looked at. It can be read once.

    Attributes:
        path: The file, for messages.
        encoding: What its byte order mark says, else the user, else UTF-8.
        kind: What it holds; of a format that is not read, nothing.
        unsupported: The format that keeps it from being read; None for text and tables.
    """

    def __init__(self, raw: Stream, path: Path | RemoteFile, options: ReadOptions) -> None:
        self.path = path
        self._raw = raw
        self._options = options
        self._head = _checked(path, lambda: _read_head(raw, b"", HEAD_BYTES))
        self._compression = compression_of(path.name, self._head)
        content = self._head
        if self._compression is not None:
            self._head = _checked(path, lambda: _read_head(raw, self._head, PACKED_HEAD_BYTES))
            content = unpacked_head(self._compression, self._head, HEAD_BYTES)
        self.encoding = marked_encoding(content) or options.encoding or "utf-8"
        kind = recognize(unpacked_name(path.name), content, options.format, encoding=options.encoding)
        if not isinstance(kind, UnsupportedFormat) and kind not in TEXT_KINDS:
            kind = self._require_positions(cast(TableKind, kind))
        self.unsupported = kind if isinstance(kind, UnsupportedFormat) else None
        self.kind = None if isinstance(kind, UnsupportedFormat) else kind
        self._check = DecodingCheck(path, self.encoding, options.encoding is not None)

    def documents(self, count: InputCount, counts: ReadCounts) -> Iterator[tuple[str, Iterable[str]]]:
        """Yield the name and the text of each document, the text in chunks; a null is an empty text.

        Raises:
            DataError: It is in an unsupported format, damaged, hardly decodes, or has a row without a text.
        """
        if self.unsupported is not None:
            raise self.unsupported.refusal(self.path)
        if isinstance(self.path, RemoteFile):
            count.hash(self.path.identity.encode())
        if self.kind == "text":
            yield self.path.name, without_mark(self._decoded(self._open(count), counts))
            return
        for row in self._rows(count, counts):
            name = f"{self.path.name}:{row.place}"
            if row.text is None:
                counts.add_null(name)
            text, invalid = repair(row.text or "")
            counts.replacements += invalid
            yield name, [text]

    def read_through(self, count: InputCount) -> None:
        """Read the file to its end, only to count and hash it."""
        stream = io.BufferedReader(_Counted(self._raw, self._head, count), _READ_BYTES)
        for _ in _chunks(stream, self.path):
            pass

    def _require_positions(self, kind: TableKind) -> TableKind | UnsupportedFormat:
        """Return the kind of a table if it can be read in any order, which a table is."""
        name = TABLE_NAMES[kind]
        if self._compression is not None:
            return UnsupportedFormat(f"{name}, compressed as a whole", "unpack it first; it is compressed inside")
        if not self._raw.seekable():
            return UnsupportedFormat(f"{name} from a pipe", "name the file: it is not read from front to back")
        return kind

    def _rows(self, count: InputCount, counts: ReadCounts) -> Iterator[Row]:
        field = self._options.text_field
        if self.kind == "csv":
            yield from csv_rows(self._lines(self._open(count), counts), self.path, field)
            return
        is_decoded = self.kind == "jsonl" and self.encoding != "utf-8"
        if self.kind != "jsonl":
            rows = self._table_rows(count)
        elif is_decoded:
            rows = json_lines(self._as_utf8(self._open(count), counts).readline, self.path, field)
        else:
            stream = self._open(count)
            rows = json_lines(lambda size: _checked(self.path, lambda: stream.readline(size)), self.path, field)
        for row in rows:
            if not is_decoded:
                self._check.add(row.encoded, row.invalid)
            yield row
        if not is_decoded:
            self._finish(counts)

    def _table_rows(self, count: InputCount) -> Iterator[Row]:
        """Yield the rows of a table; all of its bytes are hashed, and counted as the rows come."""
        size = self._raw.seek(0, io.SEEK_END)
        self._raw.seek(0)
        for chunk in () if isinstance(self.path, RemoteFile) else _chunks(self._raw, self.path):
            count.hash(chunk)
        self._raw.seek(0)
        kind, options = cast(TableKind, self.kind), self._options
        table, done = TableFile(self._raw, self.path, kind, options.text_field, size, options.sample_seed), 0
        for row, position in table.rows():
            count.advance(position - done)
            done = position
            yield row
        count.advance(size - done)

    def _open(self, count: InputCount) -> io.BufferedIOBase:
        counted = _Counted(self._raw, self._head, count, is_hashed=not isinstance(self.path, RemoteFile))
        stream = io.BufferedReader(counted, _READ_BYTES)
        if self._compression is None:
            return stream
        unpacked = Unpacked(self._compression, stream, lambda: counted.bytes_read, self.path)
        return io.BufferedReader(unpacked, _READ_BYTES)

    def _as_utf8(self, stream: io.BufferedIOBase, counts: ReadCounts) -> io.BufferedIOBase:
        return io.BufferedReader(_Utf8(without_mark(self._decoded(stream, counts))), _READ_BYTES)

    def _lines(self, stream: io.BufferedIOBase, counts: ReadCounts) -> Iterator[str]:
        text = io.TextIOWrapper(cast(BinaryIO, self._as_utf8(stream, counts)), "utf-8", newline="")
        number = 0
        while line := text.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{self.path}, line {number}: it is longer than 64 MB", fix="cut it into several rows")
            yield line

    def _decoded(self, stream: io.BufferedIOBase, counts: ReadCounts) -> Iterator[str]:
        decoder = text_decoder(self.encoding)
        for chunk in chain(_chunks(stream, self.path), [b""]):
            text, invalid = repair(decoder.decode(chunk, final=not chunk))
            counts.replacements += invalid
            self._check.add(chunk, invalid)
            yield text
        self._finish(counts)

    def _finish(self, counts: ReadCounts) -> None:
        self._check.finish()
        if self._check.invalid:
            counts.add_replaced_in(self.path.name)


class _Counted(io.RawIOBase):
    """A file that counts and hashes what is read through it, from its beginning."""

    def __init__(self, file: Stream, head: bytes, count: InputCount, *, is_hashed: bool = True) -> None:
        self._file = file
        self._head = head
        self._count = count
        self._is_hashed = is_hashed
        self.bytes_read = 0

    def readable(self) -> bool:
        """Return True, as `io.BufferedReader` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` from the file and count the bytes."""
        data = self._head[: len(buffer)] or self._file.read(len(buffer)) or b""
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        self._count.advance(len(data))
        if self._is_hashed:
            self._count.hash(data)
        self.bytes_read += len(data)
        return len(data)


class _Utf8(io.RawIOBase):
    """A text of any encoding as a stream of UTF-8."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts
        self._rest = b""

    def readable(self) -> bool:
        """Return True, as `io.BufferedReader` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` with the next bytes."""
        while not self._rest:
            text = next(self._texts, None)
            if text is None:
                return 0
            self._rest = text.encode("utf-8")
        data, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def _read_head(raw: Stream, head: bytes, size: int) -> bytes:
    """Return the beginning of a file, ``size`` bytes if it has them, of which ``head`` was read before."""
    while len(head) < size and (more := raw.read(size - len(head))):  # a pipe gives less than it is asked
        head += more
    return head


def _chunks(stream: Stream, path: Path | RemoteFile) -> Iterator[bytes]:
    while chunk := _checked(path, lambda: stream.read(_READ_BYTES)):
        yield chunk


def _checked(path: Path | RemoteFile, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except DAMAGE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path | RemoteFile, error: BaseException) -> DataError:
    if isinstance(error, OSError) and error.strerror:
        return DataError(f"{path} cannot be read: {error.strerror}", fix="check the file and its permissions")
    return DataError(
        f"{path} cannot be read: {error}",
        fix="it is damaged or was cut off: fetch or write it again; nothing was made of it",
    )
