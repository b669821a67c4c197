"""Byte-level BPE: the letter that a vocabulary has for each byte, and the bytes that each token stands for."""

from __future__ import annotations

from collections.abc import Mapping

MAX_ID = 1 << 24  # one false id must not take gigabytes; vocabularies have up to some 2^18 tokens


def byte_alphabet() -> dict[int, str]:
    """Return the letter that byte-level BPE writes for each byte value.

    Printable Latin-1 stands for itself, the other 68 values are moved to U+0100 upwards in their order
    (GPT-2, ``bytes_to_unicode``), so that a vocabulary file holds no control characters and no spaces.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [value for value in range(256) if value not in printable]
    return {value: chr(value) if value in printable else chr(256 + moved.index(value)) for value in range(256)}


def bytes_of_tokens(vocabulary: Mapping[str, int]) -> list[bytes]:
    """Return the bytes of each id by the library's rule: a token with a letter of no byte is plain UTF-8.

    Raises:
        ValueError: An id is so large that the table would fill the memory.
    """
    values = {letter: value for value, letter in byte_alphabet().items()}
    largest = max(vocabulary.values(), default=-1)
    if largest > MAX_ID:
        raise ValueError(f"it has a token with the id {largest}")
    table = [b""] * (largest + 1)
    for token, index in vocabulary.items():
        inside = all(letter in values for letter in token)
        table[index] = bytes(values[letter] for letter in token) if inside else token.encode("utf-8")
    return table
