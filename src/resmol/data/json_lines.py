"""JSON lines: one object on each line, with a document in one of its fields."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from resmol.data.text_field import find_text, no_text
from resmol.errors import DataError

MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class Row:
    """A line of JSON or of a table.

    Attributes:
        place: Its number, for messages: the line, or the row.
        encoded: What is checked for its encoding: the line, or the text.
        invalid: How many of these bytes are not UTF-8; each is a lone surrogate in ``text``.
        text: The document; None for a null.
    """

    place: str
    encoded: bytes
    invalid: int
    text: str | None


def json_lines(read_line: Callable[[int], bytes], path: object, text_field: str) -> Iterator[Row]:
    """Yield each line that is not blank.

    Args:
        read_line: Reads a line of UTF-8, at most as many bytes as it is told.
        path: For messages.
        text_field: The field with the text, or several of which the first that is there counts; a dot leads into an
            object (``data.text``).

    Raises:
        DataError: Names the line that is too long, is not JSON, or has no text in that field.
    """
    number = 0
    while encoded := read_line(MAX_LINE_BYTES + 1):
        number += 1
        if len(encoded) > MAX_LINE_BYTES:
            raise _bad_line(path, number, "it is longer than 64 MB; a text file of its own may be of any length")
        if number == 1:
            encoded = encoded.removeprefix(codecs.BOM_UTF8)
        if encoded.strip():
            line, invalid = decode_escaped(encoded)
            yield Row(str(number), encoded, invalid, _text_of(line, path, number, text_field))


def decode_escaped(encoded: bytes) -> tuple[str, int]:
    """Return UTF-8 as text, each invalid byte as a lone surrogate, and the number of these."""
    text = encoded.decode("utf-8", errors="surrogateescape")
    return text, 0 if _is_utf8(text) else sum("\udc80" <= letter <= "\udcff" for letter in text)


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _text_of(line: str, path: object, number: int, text_field: str) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _bad_line(path, number, f"it is not JSON ({error})") from error
    text = find_text(record, text_field)
    if text is not None and not isinstance(text, str):
        raise no_text(f"{path}, line {number}", record, text_field, path)
    return text


def _bad_line(path: object, number: int, why: str) -> DataError:
    return DataError(
        f"{path}, line {number}: {why}",
        fix="repair or drop the line; each line is one JSON object that holds a document in one field",
    )
