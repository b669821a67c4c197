"""Text from outside: JSON parsed strictly, values quoted and listed for a message, passwords hidden."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from resmol.system.byte_order_mark import decode_text

MAX_QUOTED = 80


def parse_json(text: str | bytes) -> Any:
    """Parse JSON without the two liberties that readers resolve differently: repeated keys, and NaN or infinity.

    Args:
        text: The document; bytes are decoded by their byte order mark, or else as UTF-8.

    Raises:
        ValueError: It is not such a document; the message names the first problem.
        RecursionError: It is nested thousands of levels deep.
    """
    decoded = decode_text(text) if isinstance(text, bytes) else text
    return json.loads(decoded, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it has the key {quoted(key)} twice")
    return table


def _no_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is not JSON")


def quoted(value: object) -> str:
    """Return a value as Python writes it, escaped and cut to one short line."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTED else f"{text[: MAX_QUOTED - 3]}..."


def listed(items: Sequence[str], most: int, separator: str = ", ") -> str:
    """Return the first items as a phrase, and how many more there are."""
    return separator.join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def without_password(text: str) -> str:
    """Return a text whose addresses have lost their user and password, which HF_ENDPOINT and proxies may hold.

    They end at the last @ before the path, as in RFC 3986, so that an @ inside the password hides nothing less.
    """
    return re.sub(r"//[^/?#\s]*@", "//", text)
