"""How numbers and changes are written in a sentence."""

from __future__ import annotations

from collections.abc import Mapping


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 token``, ``1,024 tokens``."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {' or '.join(map(_plural, noun.split(' or ')))}"


def _plural(noun: str) -> str:
    """Return the plural of a regular English noun: steps, processes, copies."""
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"


def in_words(changes: Mapping[str, Mapping[str, object]]) -> str:
    """Return recorded changes, ``key -> {"from": ..., "to": ...}``, in words: ``threads 1 -> 2, torch 2.8 -> 2.9``."""
    return ", ".join(f"{key} {change['from']} -> {change['to']}" for key, change in changes.items())
