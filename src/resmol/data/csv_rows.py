"""CSV: rows under a header, with a document in one of the columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from resmol.data.json_lines import MAX_LINE_BYTES, Row
from resmol.data.text_field import MISSING, find_text, name_the_field, shown_fields
from resmol.errors import DataError

_DELIMITERS = ",;\t"


def csv_rows(lines: Iterator[str], path: object, text_field: str) -> Iterator[Row]:
    """Yield each row; a row that is blank is no document.

    Args:
        lines: The lines with their ends; the first one is the header, in which the delimiter is the most frequent of
            comma, semicolon and tab.
        path: For messages.
        text_field: The column with the text, or several of which the first that is there counts.

    Raises:
        DataError: There is no such column, or a row is not one: its line is named.
    """
    header_line = next(lines, "")
    delimiter = max(_DELIMITERS, key=header_line.count)
    csv.field_size_limit(MAX_LINE_BYTES)  # of the process; a smaller one is nobody's wish
    rows = csv.reader(_chained(header_line, lines), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        if find_text(dict.fromkeys(header, ""), text_field) is MISSING:
            raise _no_column(path, header, next(rows, []), text_field)
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise _bad_row(path, rows.line_num, f"the row has {len(row)} fields, and the header has {len(header)}")
            text = find_text(dict(zip(header, row, strict=True)), text_field)
            yield Row(str(rows.line_num), b"", 0, text)
    except csv.Error as error:
        raise _bad_row(path, rows.line_num, f"{error}") from error


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _no_column(path: object, header: list[str], first_row: list[str], text_field: str) -> DataError:
    if not any(header):
        return DataError(f"{path} has no header", fix="give it a first line that names its columns")
    lengths = {name: len(value) for name, value in zip(header, first_row, strict=False) if name}
    longest = max(lengths, key=lambda name: lengths[name]) if lengths else header[0]
    return DataError(
        f"{path} has no column {text_field!r}; its columns are {shown_fields(header)}",
        fix=name_the_field(path, longest),
    )


def _bad_row(path: object, line: int, why: str) -> DataError:
    return DataError(
        f"{path}, line {line}: {why}",
        fix="repair or drop the row (a field with quotes, delimiters or line breaks is in quotes, quotes in it are "
        f"doubled), or read the file as it stands: resmol prepare OUT --input '{path}' --format text",
    )
