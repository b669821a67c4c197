"""The ranks that write and read one checkpoint together: who they are, and how each learns what the others have done.

They exchange JSON and no tensors. One process is a group of one.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from resmol.errors import DiskFull

Result = TypeVar("Result")


class Ranks(ABC):
    """The ranks of a run, as one of them sees them.

    All ranks make the same calls in the same order. Each thread needs a group of its own (`for_thread`).

    Attributes:
        rank: This rank, from 0.
        world_size: Number of ranks.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    @abstractmethod
    def exchange(self, what: str, message: Any) -> list[Any]:
        """Give all ranks a message, and return the messages of all, in the order of the ranks.

        Args:
            what: What a rank has done when it arrives here, for the error.
            message: Anything that JSON holds.

        Raises:
            ProcessLost: A rank died, or did not arrive in time.
        """

    @abstractmethod
    def for_thread(self) -> Ranks:
        """Return the same ranks for another thread; the calls of both threads are independent of each other."""

    @abstractmethod
    def abandon(self) -> None:
        """Let an exchange that waits for other ranks fail at once, and each later one that would have to wait."""


class OneRank(Ranks):
    """A process without other ranks: it waits for nobody."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def exchange(self, what: str, message: Any) -> list[Any]:
        """Return the message."""
        del what
        return [message]

    def for_thread(self) -> Ranks:
        """Return itself, which has no state."""
        return self

    def abandon(self) -> None:
        """Do nothing."""


ONE_RANK = OneRank()


def together(ranks: Ranks, what: str, work: Callable[[], Result]) -> list[Any]:
    """Let every rank do its part, and return the results of all when the last one is done.

    Args:
        ranks: All of them call this.
        what: What they do, for the error that names a rank which does not arrive.
        work: The part of this rank; the result is anything that JSON holds.

    Raises:
        DiskFull: There was no room for the part of some rank; all ranks raise it.
        OSError: The part of some rank failed; all ranks raise it.
        ProcessLost: A rank died, or did not arrive in time.
    """
    own, result = None, None
    try:
        result = work()
    except (DiskFull, OSError) as error:
        own = error
    outcomes = ranks.exchange(what, {"result": result} if own is None else {"error": _as_json(own)})
    if own is not None:
        raise own
    for rank, outcome in enumerate(outcomes):
        if "error" in outcome:
            raise _from_json(outcome["error"], rank)
    return [outcome["result"] for outcome in outcomes]


def balanced(sizes: Mapping[tuple[str, str], int], bins: int) -> dict[tuple[str, str], int]:
    """Share items among bins by their sizes, the largest first to the bin with least (Graham 1969)."""
    loads, result = [0] * bins, dict[tuple[str, str], int]()
    for item in sorted(sizes, key=lambda item: -sizes[item]):
        result[item] = min(range(bins), key=loads.__getitem__)
        loads[result[item]] += sizes[item]
    return result


def _as_json(error: DiskFull | OSError) -> dict[str, Any]:
    if isinstance(error, DiskFull):
        return {"what": error.what, "fix": error.fix}
    return {"errno": error.errno, "reason": error.strerror or str(error), "file": os.fspath(error.filename or "")}


def _from_json(error: dict[str, Any], rank: int) -> DiskFull | OSError:
    if "what" in error:
        return DiskFull(f"rank {rank}: {error['what']}", fix=error["fix"])
    return OSError(error["errno"], f"rank {rank}: {error['reason']}", error["file"] or None)
