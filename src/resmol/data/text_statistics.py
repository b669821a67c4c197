"""Whether a text is sane, in a few numbers: lengths of documents, scripts of letters, characters a token.

The script of a letter is the first word of its Unicode name (``LATIN SMALL LETTER A``), which the standard library
knows. All of it takes a few per cent of the time of tokenizing, and memory that does not grow with the text.
"""

from __future__ import annotations

import string
import unicodedata
from collections import Counter

import numpy as np

from resmol.data.saved_state import State, as_array, from_array
from resmol.data.source_facts import RepeatedDocument, TextStatistics

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)

_ASCII = bytes(range(128))
_LETTERS = string.ascii_letters.encode("ascii")
_BUFFER_BYTES = 1 << 20
_CODE_POINTS = 0x110000
_SHOWN_SCRIPTS = 8
_NAMES = {"CJK": "Han"}


class StatisticsCounter:
    """Counts pieces of text and lengths of documents, for `facts`."""

    def __init__(self) -> None:
        self._characters = 0
        self._ascii_letters = 0
        self._other = bytearray()  # UTF-8 without its ASCII, which is UTF-8 again
        self._code_points = np.zeros(_CODE_POINTS, dtype=np.int64)
        self._lengths: Counter[int] = Counter()  # at most about the square root of twice the tokens

    def add(self, text: str, encoded: bytes) -> None:
        """Count a piece of text, given with its UTF-8."""
        self._characters += len(text)
        self._ascii_letters += len(encoded) - len(encoded.translate(None, _LETTERS))
        if len(text) != len(encoded):
            self._other += encoded.translate(None, _ASCII)
            if len(self._other) > _BUFFER_BYTES:
                self._count_code_points()

    def add_length(self, tokens: int) -> None:
        """Count a document."""
        self._lengths[tokens] += 1

    def state(self) -> State:
        """Return what was counted, for `restore`."""
        self._count_code_points()
        places = np.flatnonzero(self._code_points)
        return {
            "counts": as_array([self._characters, self._ascii_letters, list(self._lengths.items())]),
            "code_points": np.stack([places, self._code_points[places]]),
        }

    def restore(self, state: State) -> None:
        """Return to a `state`."""
        self._characters, self._ascii_letters, lengths = from_array(state["counts"])
        self._lengths = Counter(dict(lengths))
        places, counts = state["code_points"]
        self._code_points[:] = 0
        self._code_points[places] = counts
        self._other = bytearray()

    def facts(self, most_frequent: tuple[RepeatedDocument, ...]) -> TextStatistics:
        """Return what was counted."""
        self._count_code_points()
        return TextStatistics(
            characters=self._characters,
            document_tokens=_quantiles(self._lengths),
            letters=self._letters(),
            most_frequent=most_frequent,
        )

    def _count_code_points(self) -> None:
        codes = np.frombuffer(self._other.decode("utf-8").encode("utf-32-le"), dtype="<u4")
        self._code_points += np.bincount(codes, minlength=_CODE_POINTS)
        self._other = bytearray()

    def _letters(self) -> dict[str, int]:
        found = Counter({"Latin": self._ascii_letters})
        for code in np.flatnonzero(self._code_points).tolist():
            if script := script_of(chr(code)):
                found[script] += int(self._code_points[code])
        shown = dict(found.most_common(_SHOWN_SCRIPTS))
        rest = found.total() - sum(shown.values())
        return {name: count for name, count in {**shown, "other": rest}.items() if count}


def script_of(character: str) -> str | None:
    """Return the script of a letter, such as ``Latin``, ``Han`` or ``Cyrillic``; None for what is no letter."""
    if not unicodedata.category(character).startswith("L"):
        return None
    word = unicodedata.name(character, "unknown").split()[0].split("-")[0]
    return _NAMES.get(word, word.capitalize())


def _quantiles(lengths: Counter[int]) -> tuple[int, ...]:
    """Return the length of the document at each of `QUANTILES`, rounded down to a document; () without any."""
    if not lengths:
        return ()
    values = sorted(lengths)
    ends = np.cumsum([lengths[value] for value in values])
    places = [int(share * (int(ends[-1]) - 1)) for share in QUANTILES]
    return tuple(values[int(np.searchsorted(ends, place, side="right"))] for place in places)
