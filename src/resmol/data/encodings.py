"""The encoding of a text: what it looks like, and whether a file decodes well enough to be text at all."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from resmol.errors import DataError, UsageError

MAX_REPLACED_SHARE = 0.03  # latin-1 text of a language with few accents has 2 to 3 %
_FIRST_LOOK_BYTES = 1 << 20
_SAMPLE_BYTES = 1 << 16

_LATIN_SHARE = 0.2  # of bytes above ASCII; with more of them a text is hardly in Latin letters

# Encoding -> frequent characters of its languages, and the share of the characters above ASCII that they have at least
# in an ordinary text. The same bytes in another encoding are rare characters.
_FREQUENT = (
    ("shift_jis", "のにはをたがでてとしれさいるかな、。", 0.2),
    ("euc-jp", "のにはをたがでてとしれさいるかな、。", 0.2),
    ("cp949", "이다는을의에가은고하지로기", 0.2),
    ("gb18030", "的一是不了人我在有他这中大来上国个到说们为，。", 0.1),
    ("big5", "的一是不了人我在有他這中大來上國個到說們為，。", 0.1),
    ("cp1251", "оеаинтс", 0.4),
    ("koi8-r", "оеаинтс", 0.4),
    ("cp1253", "αειοτσν", 0.4),
    ("cp1255", "יוהלארתמ", 0.4),
    ("cp1256", "اليمونرت", 0.4),
)


def require_encoding(name: str | None) -> None:
    """Refuse a name that Python knows no text encoding for (`UsageError`)."""
    if name is None:
        return
    try:
        b"abcd".decode(name, errors="replace")
        codecs.getincrementaldecoder(name)
    except (LookupError, ValueError):
        raise UsageError(
            f"there is no text encoding {name!r}", fix="give one such as --encoding cp1252, utf-16-le or gb18030"
        ) from None


def likely_encoding(sample: bytes) -> str:
    """Return the encoding that a text looks like, given a piece of it that is not UTF-8."""
    sample = sample[: sample.rfind(b"\n") + 1] or sample
    high = len(sample) - len(sample.translate(None, bytes(range(128, 256))))
    if high <= _LATIN_SHARE * len(sample):
        return "cp1252"
    for encoding, frequent, share in _FREQUENT:
        try:
            others = [character for character in sample.decode(encoding) if character > "\x7f"]
        except UnicodeDecodeError:
            continue
        if sum(character in frequent for character in others) >= share * len(others):
            return encoding
    return "another one, or no text at all"


@dataclass
class DecodingCheck:
    """Counts the bytes of one file that its encoding does not have, and refuses the file when they are too many.

    Attributes:
        path: The file, for the message.
        encoding: Its encoding.
        certain: Whether the user named it; then nothing is refused.
        seen: Bytes so far.
        invalid: Of these, the ones that were replaced.
    """

    path: object
    encoding: str
    certain: bool
    seen: int = 0
    invalid: int = 0
    sample: bytes = b""

    def add(self, data: bytes, invalid: int) -> None:
        """Count what was read; raise what `finish` raises as soon as 1 MB shows it."""
        self.seen += len(data)
        self.invalid += invalid
        if invalid and not self.sample:
            self.sample = data[:_SAMPLE_BYTES]
        if self.seen >= _FIRST_LOOK_BYTES:
            self.finish()

    def finish(self) -> None:
        """Refuse the file if too many of its bytes are invalid.

        Raises:
            DataError: Names the file, the share and the encoding that it looks like.
        """
        if self.certain or self.invalid <= MAX_REPLACED_SHARE * self.seen:
            return
        share = f"{100 * self.invalid / self.seen:.1f} % of its bytes ({self.invalid:,} of {self.seen:,})"
        command = f"resmol prepare OUT --input '{self.path}' --encoding"
        if self.encoding != "utf-8":
            raise DataError(
                f"{self.path}: {share} are not {self.encoding}, which its byte order mark states",
                fix=f"fetch or export the file again; or have them replaced: {command} {self.encoding}",
            )
        likely = likely_encoding(self.sample)
        named = likely if " " not in likely else "NAME"
        raise DataError(
            f"{self.path}: {share} are not UTF-8; the encoding looks like {likely}",
            fix=f"name the encoding: {command} {named}; with --encoding utf-8 these bytes are replaced",
        )
