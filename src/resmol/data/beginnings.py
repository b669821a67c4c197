"""The first words of paragraphs of prepared text: prompts in the manner of what a model was trained on."""

from __future__ import annotations

import re

from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer

_READ_TOKENS = 256  # after each position; a paragraph begins in them, or none is taken from there
_MAX_WORDS, _MAX_CHARS, _MAX_CHARS_OF_ONE_WORD = 4, 40, 12  # some scripts have no spaces between words
# Where a text that is cut out of a document may begin, the best first: a paragraph, a line, a sentence.
_BORDERS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"[.!?] "))


def first_words(dataset: Dataset, tokenizer: Tokenizer, most: int) -> list[str]:
    """Return different first words of up to ``most`` paragraphs, from held-out text if there is any.

    They follow positions spread evenly over the text: the same data gives the same words, and rarely a title.

    Args:
        dataset: The prepared text.
        tokenizer: The one that made its tokens.
        most: How many to look for.

    Raises:
        DataError: A shard is damaged.
    """
    stream = dataset.val if len(dataset.val) else dataset.train
    positions = [(2 * number + 1) * len(stream) // (2 * most) for number in range(most)]
    found = []
    for position in positions:
        tokens = stream.read(position, min(position + _READ_TOKENS, len(stream))).tolist()
        rest, *documents = (tokenizer.decode(ids) for ids in _split(tokens, dataset.eos_id))
        found.append(_opening(documents[0] if documents else _from_a_beginning(rest)))
    return list(dict.fromkeys(words for words in found if words))


def _split(tokens: list[int], end: int) -> list[list[int]]:
    """Return the tokens of each document that they touch, the first of which began before."""
    parts: list[list[int]] = [[]]
    for token in tokens[:-1] if tokens[-1:] == [end] else tokens:
        if token == end:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _from_a_beginning(text: str) -> str:
    """Return a text from its first whole paragraph on, else its first whole line or sentence; empty without one."""
    for border in _BORDERS:
        match = border.search(text)
        if match is not None and text[match.end() :].strip():
            return text[match.end() :]
    return ""


def _opening(text: str) -> str:
    """Return the first words of a text, a line that they fill with its end, such as the name of a speaker."""
    line, newline, _ = text.lstrip().partition("\n")
    words = line.split()
    if not words:
        return ""
    chosen = words[:_MAX_WORDS]
    while len(" ".join(chosen)) > _MAX_CHARS and len(chosen) > 1:
        chosen.pop()
    shown = " ".join(chosen).rstrip(" ([{")
    if len(shown) > _MAX_CHARS:
        shown = shown[:_MAX_CHARS_OF_ONE_WORD]
    whole_line = newline if len(shown) >= len(" ".join(words)) else ""
    return shown + whole_line if shown.isprintable() and "\ufffd" not in shown else ""
