"""Byte order marks: what Windows editors and PowerShell write at the beginning of a text file."""

from __future__ import annotations

import codecs

# The mark of UTF-32 begins with that of UTF-16, so it is looked for first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def marked_encoding(head: bytes) -> str | None:
    """Return the encoding that the byte order mark at the beginning of ``head`` states; None without a mark."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)


def decode_text(data: bytes) -> str:
    """Return a whole text file as text, by its byte order mark or else as UTF-8; the mark is dropped.

    Raises:
        UnicodeDecodeError: A ValueError, like those of the JSON and TOML parsers.
    """
    return data.decode(marked_encoding(data) or "utf-8").removeprefix("\ufeff")
