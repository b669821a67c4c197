"""Escape text from prompts, samples, file names and machines for Markdown.

A model can generate any text: it must not end a code block, open a tag, make a link or reverse the line.
"""

from __future__ import annotations

import re

_MARKUP = re.compile(r"([\\`*_{}\[\]<>()#|~&!@:$])")
# Directional controls turn the text around that follows them; line and paragraph separators end a line.
_INVISIBLE = re.compile(r"[\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_BREAKS = re.compile(r"\r\n?|[\u2028\u2029]")


def clean(text: object) -> str:
    """Return text that UTF-8 can hold, with plain line ends and without control characters."""
    return _CONTROL.sub("\ufffd", _INVISIBLE.sub("\ufffd", _BREAKS.sub("\n", str(text))))


def plain(text: object) -> str:
    """Return text as it reads, in one line, for a sentence or a cell of a table."""
    line = " ".join(clean(text).split())
    return re.sub(r"(?i)\b(www)\.", r"\1\\.", _MARKUP.sub(r"\\\1", line))


def code_span(text: object) -> str:
    """Return text in one line as inline code; the fence is longer than any in it (CommonMark 6.1)."""
    line = " ".join(clean(text).split(" ")).replace("\n", " ").replace("\t", " ")
    fence = "`" * (_longest_run(line) + 1)
    space = " " if "`" in line or line != line.strip() or not line else ""
    return f"{fence}{space}{line}{space}{fence}"


def code_block(text: object) -> str:
    """Return text as a block of code; the fence is longer than any in it (CommonMark 4.5)."""
    body = clean(text).strip("\n")
    fence = "`" * max(3, _longest_run(body) + 1)
    return f"{fence}text\n{body}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)
