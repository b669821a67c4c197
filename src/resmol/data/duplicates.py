"""Find documents that are exact copies of others, by a hash of 8 bytes for each."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np

from resmol.data.shards import SPLITS


class Duplicates:
    """The hashes of all documents of both splits. Two different texts share one with probability 2^-64."""

    def __init__(self) -> None:
        self._hashes = {split: array("Q") for split in SPLITS}
        self._open = hashlib.blake2b(digest_size=8)

    def add(self, piece: bytes) -> None:
        """Take the next piece of the current document."""
        self._open.update(piece)

    def end_document(self, split: str) -> None:
        """Note that the current document ends here, and its split."""
        self._hashes[split].append(int.from_bytes(self._open.digest(), "little"))
        self._open = hashlib.blake2b(digest_size=8)

    def hold_out_last(self) -> None:
        """Move the last document of train to val."""
        self._hashes["val"].append(self._hashes["train"].pop())

    def count(self) -> tuple[int, int]:
        """Return how many documents repeat another one, and how many of val are in train as well."""
        train, val = (np.array(self._hashes[split], dtype=np.uint64) for split in SPLITS)
        distinct = len(np.unique(np.concatenate([train, val])))
        return len(train) + len(val) - distinct, int(np.isin(val, train).sum())
