"""Find documents that are exact copies of others, by a hash of 8 bytes for each.

Memory: 8 bytes for each distinct document, as much again while a sorted array grows, and a fixed 60 MB: 10 million
documents take at most 220 MB. Two different texts share a hash with probability 2^-64.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt64

from resmol.data.saved_state import State, as_array, from_array
from resmol.data.shards import SPLITS
from resmol.data.source_facts import RepeatedDocument

RECENT = 1 << 17  # hashes in a Python set, before they join the sorted array
_REPEATED = 1 << 15  # texts that repeat and are counted by name
_SHOWN_DOCUMENTS = 5
_SHOWN_CHARACTERS = 60
BEGINNING_CHARACTERS = 4 * _SHOWN_CHARACTERS  # of a document: what is shown of it, with white space to spare


class HashSet:
    """A growing set of 64-bit numbers: a sorted array, and a small set of what came last."""

    def __init__(self, numbers: UInt64[np.ndarray, " n"] | None = None) -> None:
        """Begin with numbers in increasing order."""
        self._sorted: UInt64[np.ndarray, " n"] = np.empty(0, dtype=np.uint64) if numbers is None else numbers
        self._recent: set[int] = set()

    def __contains__(self, number: int) -> bool:
        if number in self._recent:
            return True
        place = int(np.searchsorted(self._sorted, np.uint64(number)))
        return place < len(self._sorted) and int(self._sorted[place]) == number

    def add(self, number: int) -> None:
        """Add a number that is not in the set."""
        self._recent.add(number)
        if len(self._recent) >= RECENT:
            self._join()

    def numbers(self) -> UInt64[np.ndarray, " n"]:
        """Return the numbers in increasing order."""
        self._join()
        return self._sorted

    def _join(self) -> None:
        recent = np.sort(np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent)))
        self._recent.clear()
        self._sorted = np.insert(self._sorted, np.searchsorted(self._sorted, recent), recent)

    def remove(self, number: int) -> None:
        """Remove a number that is in the set."""
        if number in self._recent:
            self._recent.remove(number)
        else:
            self._sorted = np.delete(self._sorted, int(np.searchsorted(self._sorted, np.uint64(number))))


@dataclass
class _Repeated:
    beginning: str
    times: int = 1


class Duplicates:
    """The hashes of the documents of both splits.

    Attributes:
        count: How many documents repeat an earlier one.
    """

    def __init__(self) -> None:
        self.count = 0
        self._seen = {split: HashSet() for split in SPLITS}
        self._val = array("Q")
        self._last_of_train: tuple[int, bool] | None = None  # its hash, and whether no document of train had it before
        self._repeated: dict[int, _Repeated] = {}
        self._open = hashlib.blake2b(digest_size=8)

    def state(self) -> State:
        """Return all of it but the current document."""
        repeated = [(number, one.beginning, one.times) for number, one in self._repeated.items()]
        return {
            **{split: seen.numbers() for split, seen in self._seen.items()},
            "held_out": np.array(self._val, dtype=np.uint64),
            "facts": as_array([self.count, self._last_of_train, repeated]),
        }

    def restore(self, state: State) -> None:
        """Return to a `state`; the current document stays."""
        self._seen = {split: HashSet(state[split]) for split in SPLITS}
        self._val = array("Q", state["held_out"].tobytes())
        self.count, last, repeated = from_array(state["facts"])
        self._last_of_train = None if last is None else (last[0], last[1])
        self._repeated = {number: _Repeated(beginning, times) for number, beginning, times in repeated}

    def begin_document(self) -> None:
        """Forget the pieces that were taken since the last document ended."""
        self._open = hashlib.blake2b(digest_size=8)

    def add(self, piece: bytes) -> None:
        """Take the next piece of the current document."""
        self._open.update(piece)

    def end_document(self, split: str, beginning: str, *, keep_copies: bool = True) -> bool:
        """Note that the current document ends here; return whether it is a copy of an earlier one.

        Args:
            split: Where it goes.
            beginning: Its first `BEGINNING_CHARACTERS`, for `most_frequent`.
            keep_copies: Whether a copy goes there as well, or is left out.
        """
        number = int.from_bytes(self._open.digest(), "little")
        self.begin_document()
        is_new = number not in self._seen[split]
        is_copy = not is_new or any(number in self._seen[other] for other in SPLITS if other != split)
        if is_copy:
            self._count_copy(number, beginning)
        if is_copy and not keep_copies:
            return True
        if is_new:
            self._seen[split].add(number)
        if split == "val":
            self._val.append(number)
        else:
            self._last_of_train = number, is_new
        return is_copy

    def _count_copy(self, number: int, beginning: str) -> None:
        self.count += 1
        if number in self._repeated or len(self._repeated) < _REPEATED:
            printable = "".join(letter if letter.isprintable() else " " for letter in beginning)
            text = " ".join(printable.split())[:_SHOWN_CHARACTERS]
            self._repeated.setdefault(number, _Repeated(text)).times += 1

    def hold_out_last(self) -> None:
        """Move the last document of train to val."""
        assert self._last_of_train is not None
        number, is_new = self._last_of_train
        self._val.append(number)
        if is_new:
            self._seen["train"].remove(number)

    def val_in_train(self) -> int:
        """Return how many documents of val are in train as well."""
        return sum(number in self._seen["train"] for number in self._val)

    def most_frequent(self) -> tuple[RepeatedDocument, ...]:
        """Return the documents that occur most often (among the first 32,768 texts that repeat)."""
        ranked = sorted(self._repeated.values(), key=lambda one: -one.times)[:_SHOWN_DOCUMENTS]
        return tuple(RepeatedDocument(times=one.times, beginning=one.beginning) for one in ranked)
