"""Numbers and changes in a sentence."""

from __future__ import annotations

import pytest

from resmol.system.wording import counted, in_words


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "token", "1 token"), (0, "token", "0 tokens"), (2048, "token", "2,048 tokens"), (2, "copy", "2 copies"),
        (1, "exact copy", "1 exact copy"), (3, "day", "3 days"), (2, "process", "2 processes"),
        (2, "batch", "2 batches"),
        (2, "byte or surrogate", "2 bytes or surrogates"), (1, "byte or surrogate", "1 byte or surrogate"),
    ],
)  # fmt: skip
def test_a_noun_agrees_with_its_number(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text


def test_changes() -> None:
    changes = {"threads": {"from": 1, "to": 2}, "torch": {"from": None, "to": "2.9"}}
    assert in_words(changes) == "threads 1 -> 2, torch None -> 2.9"
