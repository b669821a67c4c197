"""Text in: files, folders, jsonl, standard input, as documents that are read in pieces.

Nothing here holds a whole document: a file of 1 GB, or a line of 1 GB, passes through as pieces (see `text`).
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from resmol.data.chunking import InputCount, ReadCounts, cut_into_pieces, decoded, repaired, without_mark
from resmol.errors import DataError

MAX_JSONL_LINE_BYTES = 64 << 20
SUFFIXES = (".txt", ".md", ".text", ".jsonl", ".txt.gz", ".jsonl.gz")

_READ_BYTES = 1 << 18

Split = Literal["train", "val"]


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        name: For messages: a file name, or a file name and a line.
        pieces: Its text, to be read once, before the next document is asked for.
        split: Where a named corpus wants it; None leaves the choice to `prepare`.
    """

    name: str
    pieces: Iterator[str]
    split: Split | None = None


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read, again and again unless they come from standard input.

    Attributes:
        name: For messages.
        bytes_total: Bytes on the disk, None where nobody knows (standard input).
        read: Yields the documents and fills the counts as it goes.
    """

    name: str
    bytes_total: int | None
    read: Callable[[ReadCounts], Iterator[Document]]


def read_inputs(paths: Sequence[str | Path], *, text_field: str = "text") -> Corpus:
    """Return the documents of files, of folders (recursive, see `SUFFIXES`) and of ``-``, standard input.

    A `.jsonl` file holds one document a line, in ``text_field``; any other file is one document. ``.gz`` is
    unpacked on the way. Invalid UTF-8 is replaced and counted, a byte order mark is dropped, line ends stay
    as they are.

    Raises:
        DataError: Nothing was named, a path is missing or unreadable, or a folder holds no text; later, while
            reading, a broken archive or a line that is not JSON.
    """
    if not paths:
        raise DataError("no input was named", fix="add --input PATH, or --corpus shakespeare")
    inputs = [(str(path), _files_of(path)) for path in paths]
    files = [file for _, group in inputs for file in group]
    from_pipe = any(name == "-" for name, _ in inputs) or not all(file.is_file() for file in files)

    def read(counts: ReadCounts) -> Iterator[Document]:
        for name, group in inputs:
            count = InputCount("standard input" if name == "-" else Path(name).resolve().name)
            counts.inputs.append(count)
            if name == "-":
                pipe = cast(io.BufferedIOBase, sys.stdin.buffer)
                yield from _documents(pipe, Path("-"), text_field, count, counts)
            for file in group:
                with _open(file) as raw:
                    yield from _documents(raw, file, text_field, count, counts)

    return Corpus(
        ", ".join(name for name, _ in inputs),
        None if from_pipe else sum(file.stat().st_size for file in files),
        read,
    )


def from_texts(texts: Iterable[str], *, name: str = "texts") -> Corpus:
    """Return each of ``texts`` as one document; for a program that has its text in memory."""

    def read(counts: ReadCounts) -> Iterator[Document]:
        count = InputCount(name)
        counts.inputs.append(count)
        for number, text in enumerate(texts):
            count.add(text.encode("utf-8", errors="surrogatepass"))
            yield Document(f"{name}[{number}]", cut_into_pieces(repaired([text], counts), counts))

    return Corpus(name, None, read)


def document_of_bytes(name: str, data: bytes, counts: ReadCounts, *, split: Split | None = None) -> Document:
    """Return one file's content as a document, and count it in the newest input."""
    counts.inputs[-1].files += 1
    counts.inputs[-1].add(data)
    text = without_mark(repaired(decoded([data]), counts))
    return Document(name, cut_into_pieces(text, counts), split)


def _files_of(path: str | Path) -> list[Path]:
    if str(path) == "-":
        return []
    root = Path(path)
    if root.exists() and not root.is_dir():  # also a pipe, as a shell's <(command) makes it
        return [root]
    if not root.is_dir():
        raise DataError(f"there is no file or folder {root}", fix="check the path after --input")
    files = [Path(folder) / name for folder, _, names in os.walk(root) for name in names if _is_text(name)]
    if not files:
        raise DataError(f"{root} holds no text", fix=f"put files into it that end in {', '.join(SUFFIXES)}")
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _is_text(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


@contextmanager
def _open(path: Path) -> Iterator[io.FileIO]:
    try:
        file = io.FileIO(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    with file:
        yield file


class _Counted(io.RawIOBase):
    """A file that counts and hashes what is read through it."""

    def __init__(self, file: io.FileIO | io.BufferedIOBase, count: InputCount) -> None:
        self._file = file
        self._count = count

    def readable(self) -> bool:
        """Say yes, as `io.BufferedReader` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` from the file and count the bytes."""
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._count.add(data)
        return len(data)


def _documents(
    raw: io.FileIO | io.BufferedIOBase, path: Path, text_field: str, count: InputCount, counts: ReadCounts
) -> Iterator[Document]:
    count.files += 1
    name = path.name.lower()
    stream = io.BufferedReader(_Counted(raw, count), _READ_BYTES)
    unpacked = gzip.GzipFile(fileobj=stream) if name.endswith(".gz") else stream
    if name.removesuffix(".gz").endswith(".jsonl"):
        yield from _jsonl_documents(unpacked, path, text_field, counts)
    else:
        text = repaired(decoded(_chunks(unpacked, path)), counts)
        yield Document(path.name, cut_into_pieces(without_mark(text), counts))


def _chunks(stream: io.BufferedIOBase, path: Path) -> Iterator[bytes]:
    while chunk := _checked(path, lambda: stream.read(_READ_BYTES)):
        yield chunk


def _checked(path: Path, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except (OSError, EOFError, zlib.error) as error:  # gzip reports damage as any of the three
        raise _unreadable(path, error) from error


def _jsonl_documents(stream: io.BufferedIOBase, path: Path, text_field: str, counts: ReadCounts) -> Iterator[Document]:
    number = 0
    while line := _checked(path, lambda: stream.readline(MAX_JSONL_LINE_BYTES + 1)):
        number += 1
        if len(line) > MAX_JSONL_LINE_BYTES:
            raise _bad_line(path, number, "it is longer than 64 MB; a text file of its own may be of any length")
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            text = _text_of_line(line, path, number, text_field)
            yield Document(f"{path.name}:{number}", cut_into_pieces(repaired([text], counts), counts))


def _text_of_line(line: bytes, path: Path, number: int, text_field: str) -> str:
    try:
        record = json.loads(line.decode("utf-8", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise _bad_line(path, number, f"it is not JSON ({error})") from error
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise _bad_line(path, number, f"it is not an object with a text in {text_field!r}")
    return text


def _bad_line(path: Path, number: int, why: str) -> DataError:
    return DataError(
        f"{path}, line {number}: {why}",
        fix="repair or drop the line; each line is one JSON object that holds a document in one field",
    )


def _unreadable(path: Path, error: BaseException) -> DataError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DataError(f"{path} cannot be read: {why}", fix="check the file and its permissions")
