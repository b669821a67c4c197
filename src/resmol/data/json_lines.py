"""JSON lines: one object on each line, with a document in one of its fields."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resmol.errors import DataError

MAX_LINE_BYTES = 64 << 20

_SHOWN_FIELDS = 8


@dataclass(frozen=True)
class JsonLine:
    """A line that is not blank.

    Attributes:
        number: Counted from 1, blank lines as well.
        encoded: Its bytes.
        invalid: How many of them are not UTF-8; each is a lone surrogate in ``text``.
        text: The document.
    """

    number: int
    encoded: bytes
    invalid: int
    text: str


def json_lines(read_line: Callable[[int], bytes], path: Path, text_field: str) -> Iterator[JsonLine]:
    """Yield each line that is not blank.

    Args:
        read_line: Reads a line of UTF-8, at most as many bytes as it is told.
        path: For messages.
        text_field: The field with the text; a dot leads into an object (``data.text``).

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
            line = encoded.decode("utf-8", errors="surrogateescape")
            invalid = 0 if _is_utf8(line) else sum("\udc80" <= letter <= "\udcff" for letter in line)
            yield JsonLine(number, encoded, invalid, _text_of(line, path, number, text_field))


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _text_of(line: str, path: Path, number: int, text_field: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _bad_line(path, number, f"it is not JSON ({error})") from error
    text = _field(record, text_field)
    if not isinstance(text, str):
        raise _no_text(record, path, number, text_field)
    return text


def _field(record: Any, name: str) -> Any:
    """Return a field by its name, else by its path through objects; None where there is none."""
    if not isinstance(record, dict):
        return None
    if name in record:
        return record[name]
    first, dot, rest = name.partition(".")
    return _field(record.get(first), rest) if dot else None


def _no_text(record: Any, path: Path, number: int, text_field: str) -> DataError:
    why = f"it is not an object with a text in {text_field!r}"
    if not isinstance(record, dict):
        return _bad_line(path, number, why)
    texts = dict(_texts(record, ""))
    fields = list(dict.fromkeys([*record, *texts]))
    shown = ", ".join(fields[:_SHOWN_FIELDS]) + (", …" if len(fields) > _SHOWN_FIELDS else "")
    if text_field in record:
        why = f"{why}, which holds {json.dumps(record[text_field])[:40]}"
    why = f"{why}; its fields are {shown}" if fields else f"{why}; it has no fields"
    if _field(record, text_field) is not None or text_field in record or not texts:
        return _bad_line(path, number, why)
    longest = max(texts, key=lambda name: texts[name])
    fix = f"name the field that holds the text: resmol prepare OUT --input '{path}' --text-field {longest}"
    return DataError(f"{path}, line {number}: {why}", fix=fix)


def _texts(record: dict[str, Any], prefix: str) -> Iterator[tuple[str, int]]:
    """Yield the name and the length of each text in a record and in the objects in it."""
    for name, value in record.items():
        if isinstance(value, str):
            yield f"{prefix}{name}", len(value)
        elif isinstance(value, dict) and not prefix:
            yield from _texts(value, f"{name}.")


def _bad_line(path: Path, number: int, why: str) -> DataError:
    return DataError(
        f"{path}, line {number}: {why}",
        fix="repair or drop the line; each line is one JSON object that holds a document in one field",
    )
