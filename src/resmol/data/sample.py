"""A reproducible part of a corpus: how many tokens of it, and in which order its files and row groups come."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TypeVar

from resmol.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
Item = TypeVar("Item")


def parse_tokens(text: str) -> int:
    """Return a number of tokens such as ``100M``, ``2.5B`` or ``50000`` (`UsageError` for anything else)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGBT]?)", text.strip())
    count = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if count < 1:
        raise UsageError(f"--max-tokens is {text!r}", fix="give a number of tokens, such as 100M or 2.5B")
    return count


def sample_order(items: Sequence[Item], seed: int | None) -> list[Item]:
    """Return items in an order that a seed draws, by the hash of seed and name; None leaves them as they are."""
    if seed is None:
        return list(items)
    return sorted(items, key=lambda item: hashlib.blake2b(f"resmol sample {seed} {item}".encode()).digest())
