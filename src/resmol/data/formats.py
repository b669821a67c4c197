"""Recognize what a file is by its content and its name, so that nothing but text is read as text."""

from __future__ import annotations

import json
import re
import tarfile
from typing import Literal

from resmol.data.format_signatures import (
    BINARY,
    BINARY_SIGNS,
    CSV_SUFFIXES,
    JSON_ARRAY,
    JSON_DOCUMENT,
    MARKUP_SIGNS,
    PICKLE,
    SAFETENSORS,
    SIGNS_IN_ZIP,
    TABLE_SIGNS,
    TAR,
    TEXT_SIGNS,
    ZIP,
    TableKind,
    UnsupportedFormat,
    unmarked,
)
from resmol.system.byte_order_mark import marked_encoding

HEAD_BYTES = 1 << 16  # of a file, to recognize it by
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".jl")
JSON_SUFFIXES = (*JSON_LINES_SUFFIXES, ".json")
MAX_ODD_SHARE = 0.03  # of control characters in the head; text has next to none
_NEAR = 512

TextKind = Literal["text", "jsonl", "csv"]
TEXT_KINDS = ("text", "jsonl", "csv")
FORMATS = ("auto", *TEXT_KINDS)

_PICKLES = (".pkl", ".pickle")  # protocol 0 is readable characters
_PICKLE = re.compile(rb"\x80[\x01-\x05][c}\]\x95\x8a(]")

_ARRAY_OF_OBJECTS = re.compile(rb"\[\s*[{\[]\s*[\"}\]]")
_SPREAD_OBJECT = re.compile(rb"\{\s*\n")
_SPREAD_FIELD = re.compile(rb"\{\s*\n\s*\"[^\"\n]*\"\s*:")
_OBJECT = re.compile(rb"\{\s*([\"}]|$)")  # the head may end after the brace
# All control characters but those that text has: bell to carriage return, and escape (coloured logs).
_CONTROLS = bytes([*range(7), *range(14, 27), *range(28, 32), 127])


def recognize(
    name: str, head: bytes, wanted: str = "auto", *, encoding: str | None = None
) -> TextKind | TableKind | UnsupportedFormat:
    """Return how to read a file, or which unsupported format it is in.

    Args:
        name: Its name, without the ending of a compression that was unpacked.
        head: Its first `HEAD_BYTES`, or all of it; unpacked.
        wanted: One of `FORMATS`. ``auto`` looks at name and content; the others are what the user says. Binary
            formats are what they are whatever is said.
        encoding: What the user says about the encoding; else a file with many control characters is binary.
    """
    name = name.lower()
    binary = _table(head) or _binary(name, head)
    if binary is not None:
        return binary
    marked = marked_encoding(head)
    if marked is None and encoding is None and _is_binary(head):
        return _without_mark(head)
    if wanted != "auto":
        return "jsonl" if wanted == "jsonl" else "csv" if wanted == "csv" else "text"
    if name.endswith(CSV_SUFFIXES):
        return "csv"
    start = _start(head, marked or encoding or "utf-8")
    return _markup(start) or _json(name, start) or "text"


def _table(head: bytes) -> TableKind | None:
    kinds = (kind for sign, kind in TABLE_SIGNS if head.startswith(sign) and _is_sign(sign, head))
    return next(kinds, None)


def _is_sign(sign: bytes, head: bytes) -> bool:
    """Return whether bytes that begin a format, and are there, mean it: letters do only where the rest is no text."""
    return not _is_plain(sign) or not _is_plain(head[:_NEAR])


def _binary(name: str, head: bytes) -> UnsupportedFormat | None:
    for offset, sign, kind, fix in BINARY_SIGNS:
        if head.startswith(sign, offset) and _is_sign(sign, head):
            return UnsupportedFormat(kind, fix)
    for sign, kind, fix in TEXT_SIGNS:
        if head.startswith(sign):
            return UnsupportedFormat(kind, fix)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")):
        return next((UnsupportedFormat(kind, fix) for sign, kind, fix in SIGNS_IN_ZIP if sign in head), ZIP)
    if head[8:9] == b"{" and head[4:8] == bytes(4):  # the length of its header, as a number of 8 bytes
        return SAFETENSORS
    if _PICKLE.match(head) or (name.endswith(_PICKLES) and head):
        return PICKLE
    return TAR if _is_tar(head) else None


def _is_plain(data: bytes) -> bool:
    return data.isascii() and len(data) == len(data.translate(None, _CONTROLS))


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")  # it compares the header's checksum
    except tarfile.HeaderError:
        return False
    return True


def _is_binary(head: bytes) -> bool:
    controls = len(head) - len(head.translate(None, _CONTROLS))
    return controls > MAX_ODD_SHARE * len(head)


def _without_mark(head: bytes) -> UnsupportedFormat:
    """Return what a head with many control characters is: UTF-16 without its mark, or something binary."""
    even, odd = head[0::2].count(0), head[1::2].count(0)
    for encoding, zeros, others in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
        if zeros > 0.4 * len(head) / 2 and others < zeros / 10:
            return unmarked(encoding)
    return BINARY


def _start(head: bytes, encoding: str) -> bytes:
    """Return the head as UTF-8, without a mark and white space before the text."""
    if encoding != "utf-8":
        head = head.decode(encoding, errors="replace").encode("utf-8", errors="replace")
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()


def _markup(start: bytes) -> UnsupportedFormat | None:
    return next((UnsupportedFormat(kind, fix) for sign, kind, fix in MARKUP_SIGNS if sign.match(start)), None)


def _json(name: str, start: bytes) -> Literal["jsonl"] | UnsupportedFormat | None:
    if _ARRAY_OF_OBJECTS.match(start) or (name.endswith(".json") and start.startswith(b"[")):
        return JSON_ARRAY
    if _SPREAD_OBJECT.match(start) and (name.endswith(".json") or _SPREAD_FIELD.match(start)):
        return JSON_DOCUMENT
    if name.endswith(JSON_SUFFIXES):
        return "jsonl"
    lines = start.split(b"\n", 2)
    followed = len(lines) == 1 or not lines[1].strip() or _OBJECT.match(lines[1])
    return "jsonl" if _OBJECT.match(start) and followed and _is_object(lines[0], whole=len(lines) > 1) else None


def _is_object(line: bytes, *, whole: bool) -> bool:
    """Return whether a line is a JSON object; one that the head cuts off counts by its beginning."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return not whole and len(line) > HEAD_BYTES // 2
