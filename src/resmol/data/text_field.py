"""The field with the text: in a JSON object, a CSV row, a column of a table, by name or by its path into objects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from resmol.errors import DataError

MISSING = object()
_SHOWN_FIELDS = 8


def candidates(text_field: str) -> tuple[str, ...]:
    """Return the names that ``--text-field`` gives: the whole, which may hold a comma, then what commas separate."""
    parts = [part.strip() for part in text_field.split(",")]
    return tuple(dict.fromkeys([text_field, *filter(None, parts)]))


def find_text(record: Any, text_field: str) -> Any:
    """Return the value of the first candidate that a record has, None for a null; `MISSING` where it has none."""
    values = (_field(record, name) for name in candidates(text_field))
    return next((value for value in values if value is not MISSING), MISSING)


def _field(record: Any, name: str) -> Any:
    """Return a field by its name, else by its path through objects; `MISSING` where there is none."""
    if not isinstance(record, Mapping):
        return MISSING
    if name in record:
        return record[name]
    first, dot, rest = name.partition(".")
    return _field(record.get(first), rest) if dot else MISSING


def no_text(place: str, record: Any, text_field: str, path: object) -> DataError:
    """Return the error for a JSON line without a text: which fields it has, and which of them to name.

    Args:
        place: The file and the line.
        record: What the line holds.
        text_field: The field that was looked for.
        path: The file, for the command.
    """
    why = f"it is not an object with a text in {text_field!r}"
    repair = "repair or drop the line; each line is one JSON object that holds a document in one field"
    if not isinstance(record, Mapping):
        return DataError(f"{place}: {why}", fix=repair)
    texts = dict(_texts(record, ""))
    found = find_text(record, text_field)
    if found is not MISSING:
        why = f"{why}, which holds {json.dumps(found)[:40]}"
    fields = list(dict.fromkeys([*record, *texts]))
    why = f"{why}; its fields are {shown_fields(fields)}" if fields else f"{why}; it has no fields"
    longest = max(texts, key=lambda name: texts[name]) if texts else None
    named = repair if found is not MISSING or longest is None else name_the_field(path, longest)
    return DataError(f"{place}: {why}", fix=named)


def name_the_field(path: object, name: str) -> str:
    """Return the sentence with the command that names a field."""
    shown = f"'{name}'" if " " in name else name
    return f"name the field that holds the text: resmol prepare OUT --input '{path}' --text-field {shown}"


def shown_fields(names: Sequence[str]) -> str:
    """Return the first names, for a sentence."""
    return ", ".join(names[:_SHOWN_FIELDS]) + (", …" if len(names) > _SHOWN_FIELDS else "")


def _texts(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, int]]:
    """Yield the name and the length of each text in a record and in the objects in it."""
    for name, value in record.items():
        if isinstance(value, str):
            yield f"{prefix}{name}", len(value)
        elif isinstance(value, Mapping) and not prefix:
            yield from _texts(value, f"{name}.")
