"""One input file, from its bytes on the disk to its text: recognized, unpacked and decoded as it is read."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from resmol.data.chunking import InputCount, ReadCounts, repair, text_decoder, without_mark
from resmol.data.encodings import DecodingCheck, require_encoding
from resmol.data.format_signatures import UnsupportedFormat
from resmol.data.formats import FORMATS, HEAD_BYTES, recognize
from resmol.data.json_lines import json_lines
from resmol.errors import DataError, UsageError
from resmol.system.byte_order_mark import marked_encoding

_READ_BYTES = 1 << 18
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class ReadOptions:
    """How to read inputs.

    Attributes:
        text_field: The field of a JSON line that holds the text; a dot leads into an object.
        encoding: Encoding of files without a byte order mark; bytes that it does not have are then replaced, however
            many they are. None is UTF-8, and refuses a file in which more than a few per cent would be.
        format: ``auto`` looks at content and name; ``text`` and ``jsonl`` say what every file is.
        include_hidden: Whether hidden files and folders in a folder are read.
    """

    text_field: str = "text"
    encoding: str | None = None
    format: str = "auto"
    include_hidden: bool = False

    def __post_init__(self) -> None:
        require_encoding(self.encoding)
        if self.format not in FORMATS:
            raise UsageError(f"--format is {self.format!r}", fix=f"choose one of: {', '.join(FORMATS)}")


@contextmanager
def open_file(path: Path) -> Iterator[io.FileIO]:
    """Open a file for `TextFile` (`DataError` where that fails)."""
    try:
        file = io.FileIO(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    with file:
        yield file


class TextFile:
    """An open file whose beginning has been looked at. It can be read once.

    Attributes:
        path: The file, for messages.
        encoding: What its byte order mark says, else the user, else UTF-8.
        is_json_lines: Whether it holds a document on each line.
        unsupported: The format that keeps it from being read; None for text.
    """

    def __init__(self, raw: io.FileIO | io.BufferedIOBase, path: Path, options: ReadOptions) -> None:
        self.path = path
        self._raw = raw
        self._options = options
        self._head = _checked(path, lambda: _read_head(raw))
        name = path.name.lower()
        self._packed = self._head.startswith(_GZIP) or (name.endswith(".gz") and self._head != b"")
        content = _unpacked_head(self._head) if self._packed else self._head
        self.encoding = marked_encoding(content) or options.encoding or "utf-8"
        kind = recognize(name.removesuffix(".gz"), content, options.format, encoding=options.encoding)
        self.unsupported = kind if isinstance(kind, UnsupportedFormat) else None
        self.is_json_lines = kind == "jsonl"
        self._check = DecodingCheck(path, self.encoding, options.encoding is not None)

    def text(self, count: InputCount, counts: ReadCounts) -> Iterator[str]:
        """Yield the text in chunks, without a byte order mark; count what was read and what was replaced.

        Raises:
            DataError: It is in an unsupported format, cannot be read, or hardly decodes.
        """
        yield from without_mark(self._decoded(self._open(count), counts))

    def lines(self, count: InputCount, counts: ReadCounts) -> Iterator[tuple[int, str]]:
        """Yield the number and the text of each JSON line; raises what `text` raises, and for a bad line."""
        stream, is_checked = self._open(count), self.encoding != "utf-8"
        if is_checked:
            stream = io.BufferedReader(_Utf8(self._decoded(stream, counts)))

        def read_line(size: int) -> bytes:
            return _checked(self.path, lambda: stream.readline(size))

        for line in json_lines(read_line, self.path, self._options.text_field):
            if not is_checked:
                self._check.add(line.encoded, line.invalid)
            yield line.number, line.text
        if not is_checked:
            self._finish(counts)

    def read_through(self, count: InputCount) -> None:
        """Read the file to its end, only to count and hash it."""
        stream = io.BufferedReader(_Counted(self._raw, self._head, count), _READ_BYTES)
        for _ in _chunks(stream, self.path):
            pass

    def _open(self, count: InputCount) -> io.BufferedIOBase:
        if self.unsupported is not None:
            raise self.unsupported.refusal(self.path)
        stream = io.BufferedReader(_Counted(self._raw, self._head, count), _READ_BYTES)
        return gzip.GzipFile(fileobj=stream) if self._packed else stream

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

    def __init__(self, file: io.FileIO | io.BufferedIOBase, head: bytes, count: InputCount) -> None:
        self._file = file
        self._head = head
        self._count = count

    def readable(self) -> bool:
        """Return True, as `io.BufferedReader` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` from the file and count the bytes."""
        data = self._head[: len(buffer)] or self._file.read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        self._count.add(data)
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


def _read_head(raw: io.FileIO | io.BufferedIOBase) -> bytes:
    head = b""
    while len(head) < HEAD_BYTES and (more := raw.read(HEAD_BYTES - len(head))):  # a pipe gives less than it is asked
        head += more
    return head


def _unpacked_head(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""  # reading it says what is wrong


def _chunks(stream: io.BufferedIOBase, path: Path) -> Iterator[bytes]:
    while chunk := _checked(path, lambda: stream.read(_READ_BYTES)):
        yield chunk


def _checked(path: Path, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except (OSError, EOFError, zlib.error) as error:  # gzip reports damage as any of the three
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> DataError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DataError(f"{path} cannot be read: {why}", fix="check the file and its permissions")
