"""From bytes to pieces of text: decoding, repair and cutting; no document is ever held as a whole."""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from resmol.data.folders import Unused
from resmol.data.source_facts import InputFacts

PIECE_CHARACTERS = 1 << 16
HARD_CUT_CHARACTERS = 1 << 18

_CHUNK_CHARACTERS = 1 << 17
_SHOWN_NAMES = 3
_BYTE_ORDER_MARK = "\ufeff"
_SURROGATE = re.compile("[\ud800-\udfff]")
# The GPT-2 pattern joins white space to the word after it, never to the one before, so a piece may end
# between a visible character and a white-space one. Both sides are chosen so that Python and the Rust library
# agree: U+180E was a space in older versions of Unicode, and Python alone counts U+001C to U+001F as spaces.
# Text without spaces may be cut between its punctuation and a kana or an ideograph, never one word either.
_SAFE_CUT = re.compile(r"[^\s\u180e](?=[ \t\n\r])|[、。，！？](?=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff])")


def _lone_surrogates(error: UnicodeError) -> tuple[str, int]:
    """Handle bytes that an encoding does not have, as ``surrogateescape`` does for those that extend ASCII."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff" * (error.end - error.start), error.end


_LONE_SURROGATES = "resmol-lone-surrogates"
codecs.register_error(_LONE_SURROGATES, _lone_surrogates)


@dataclass
class InputCount:
    """What was read so far of one input."""

    name: str
    licence: str | None = None
    files: int = 0
    byte_count: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, data: bytes) -> None:
        """Count and hash what was read."""
        self.advance(len(data))
        self.hash(data)

    def advance(self, size: int) -> None:
        """Count bytes that were read."""
        self.byte_count += size

    def hash(self, data: bytes) -> None:
        """Hash the next bytes of the input."""
        self.digest.update(data)

    def facts(self) -> InputFacts:
        """Return the count as the manifest records it."""
        return InputFacts(
            name=self.name,
            files=self.files,
            bytes=self.byte_count,
            sha256=self.digest.hexdigest(),
            licence=self.licence,
        )


@dataclass
class Findings:
    """What was remarkable in the text.

    Attributes:
        replacements: Invalid bytes and lone surrogates, each replaced by U+FFFD.
        replaced_in: Names of the first files with invalid bytes.
        null_texts: Rows whose text is null.
        first_null: The first of them, as the name of its document.
        forced_cuts: Cuts inside 256 Ki characters without white space; each may change one token.
        unused: Files and folders that were found in the inputs and not used.
    """

    replacements: int = 0
    replaced_in: list[str] = field(default_factory=list)
    null_texts: int = 0
    first_null: str = ""
    forced_cuts: int = 0
    unused: Unused = field(default_factory=Unused)

    def add_replaced_in(self, name: str) -> None:
        """Keep the name of a file with invalid bytes, if it is one of the first."""
        if len(self.replaced_in) < _SHOWN_NAMES:
            self.replaced_in.append(name)

    def add_null(self, name: str) -> None:
        """Count a row whose text is null."""
        self.null_texts += 1
        self.first_null = self.first_null or name


_FINDINGS = TypeAdapter(Findings)


@dataclass
class ReadCounts(Findings):
    """What reading found; filled while the documents of a `Corpus` are read.

    Attributes:
        inputs: One entry for each input.
        files: How many files were begun, of all inputs.
        skipped_files: How many of them are only counted and hashed: an earlier process read them.
    """

    inputs: list[InputCount] = field(default_factory=list)
    files: int = 0
    skipped_files: int = 0

    def begin_file(self) -> bool:
        """Count a file; return whether it is to be read."""
        self.files += 1
        return self.files > self.skipped_files

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs read so far, as they lie on the disk."""
        return sum(one.byte_count for one in self.inputs)

    def findings(self) -> dict[str, Any]:
        """Return the findings for `restore_findings`; JSON can hold them."""
        found: dict[str, Any] = _FINDINGS.dump_python(self, mode="json")
        return found

    def restore_findings(self, findings: dict[str, Any]) -> None:
        """Replace the findings."""
        vars(self).update(vars(_FINDINGS.validate_python(findings)))


def text_decoder(encoding: str) -> codecs.IncrementalDecoder:
    """Return a decoder that makes each invalid byte one lone surrogate, for `repair`."""
    # A valid text never holds a lone surrogate, so `repair` can recognize and count them; one for each byte makes the
    # text independent of where its chunks are cut.
    return codecs.getincrementaldecoder(encoding)(errors=_LONE_SURROGATES)


def decoded(chunks: Iterable[bytes]) -> Iterator[str]:
    """Decode UTF-8 in chunks of any size; each invalid byte becomes one lone surrogate, for `repaired`."""
    decoder = text_decoder("utf-8")
    for chunk in chunks:
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def repair(text: str) -> tuple[str, int]:
    """Return the text with U+FFFD for each lone surrogate (from `decoded`, or escaped in JSON), and their number."""
    return _SURROGATE.subn("\ufffd", text)


def repaired(chunks: Iterable[str], counts: ReadCounts) -> Iterator[str]:
    """Repair and count chunk by chunk."""
    for chunk in chunks:
        text, number = repair(chunk)
        counts.replacements += number
        yield text


def without_mark(chunks: Iterable[str]) -> Iterator[str]:
    """Drop a byte order mark at the very beginning."""
    begun = False
    for chunk in chunks:
        yield chunk if begun else chunk.removeprefix(_BYTE_ORDER_MARK)
        begun = begun or bool(chunk)


def cut_into_pieces(chunks: Iterable[str], counts: ReadCounts) -> Iterator[str]:
    """Regroup a text into pieces whose token ids, one after another, are the ids of the whole text.

    Args:
        chunks: The text in chunks of any size.
        counts: ``forced_cuts`` grows by one for each cut that was not safe.

    Yields:
        Pieces of at most 256 Ki characters, 64 Ki where the text has white space.
    """
    rest = ""
    for chunk in _bounded(chunks):
        rest += chunk
        while len(rest) > PIECE_CHARACTERS:
            end = _last_safe_cut(rest) or _first_safe_cut(rest)
            if end == 0:
                if len(rest) < HARD_CUT_CHARACTERS:
                    break
                end = HARD_CUT_CHARACTERS
                counts.forced_cuts += 1
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def _bounded(chunks: Iterable[str]) -> Iterator[str]:
    # Cutting pieces off the front of a text copies the rest; on 64 MB that would take minutes.
    for chunk in chunks:
        for start in range(0, len(chunk), _CHUNK_CHARACTERS):
            yield chunk[start : start + _CHUNK_CHARACTERS]


def _last_safe_cut(text: str) -> int:
    # Near the end first: in ordinary text the last 1 Ki characters hold a space.
    for width in (1 << 10, PIECE_CHARACTERS):
        cuts = [match.end() for match in _SAFE_CUT.finditer(text, PIECE_CHARACTERS - width, PIECE_CHARACTERS + 1)]
        if cuts:
            return cuts[-1]
    return 0


def _first_safe_cut(text: str) -> int:
    match = _SAFE_CUT.search(text, PIECE_CHARACTERS - 1, HARD_CUT_CHARACTERS)
    return match.end() if match else 0
