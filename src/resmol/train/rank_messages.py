"""JSON messages between the ranks, through torchrun's store: what they agree on while they save and load.

Tensors go through the process group. What a rank has written, and whether that failed, goes through the store instead:
that works from a thread beside training, and a rank that does not answer is named.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from resmol.errors import ProcessLost
from resmol.run.ranks import Ranks
from resmol.train.heartbeat import BEAT_SECONDS, GO_ON, MISSED_BEATS, Heartbeat, read_heartbeats
from resmol.train.rendezvous import Store

LOOK_SECONDS = 1.0  # between two looks at the heartbeats while this rank waits
POLL_SECONDS = 0.02
DEAD_SECONDS = 15.0  # without a heartbeat; a busy machine delays some


class RankMessages(Ranks):
    """The ranks of a run, which exchange messages through a store.

    Args:
        store: A connection to the store that no other thread uses.
        rank: This rank.
        world_size: Number of ranks.
        channel: Tells these exchanges from those of other threads; the same on all ranks.
    """

    def __init__(self, store: Store, rank: int, world_size: int, channel: str = "") -> None:
        super().__init__(rank, world_size)
        self._store, self._channel = store, channel
        self._limit = store.timeout.total_seconds()
        self._numbers, self._abandoned = itertools.count(1), threading.Event()

    def exchange(self, what: str, message: Any) -> list[Any]:
        """Give all ranks a message, and return those of all; rank 0 collects them.

        Raises:
            ProcessLost: A rank died, or did not arrive in time; the message names it.
        """
        number = next(self._numbers)
        own = [self._key(number, rank) for rank in range(self.world_size)]
        collected = self._key(number, "all")
        try:
            self._store.set(own[self.rank], json.dumps(message))
            if self.rank == 0:
                self._wait(own, what, own)
                self._store.set(collected, f"[{','.join(text.decode() for text in self._store.multi_get(own))}]")
                self._forget(number - 1)
            else:
                self._wait([collected], what, own)
            result: list[Any] = json.loads(self._store.get(collected))
        except dist.DistError as error:
            raise ProcessLost(f"cannot {what}: torchrun's store cannot be reached", fix=GO_ON) from error
        return result

    def for_thread(self) -> RankMessages:
        """Return the same ranks on another connection."""
        return RankMessages(self._store.clone(), self.rank, self.world_size, f"{self._channel}+")

    def abandon(self) -> None:
        """Let an exchange that waits, and each later one that would have to wait, raise `ProcessLost`."""
        self._abandoned.set()

    def _key(self, number: int, of: int | str) -> str:
        return f"resmol/messages{self._channel}/{number}/{of}"

    def _forget(self, number: int) -> None:
        """Remove an exchange that all ranks have read: they have begun the next one."""
        if number:
            for of in (*range(self.world_size), "all"):
                self._store.delete_key(self._key(number, of))

    def _wait(self, keys: Sequence[str], what: str, own: Sequence[str]) -> None:
        """Wait until keys are set (`ProcessLost`, which names the ranks whose own key is not)."""
        started, watch = time.monotonic(), _Watch(self.world_size)
        while not self._is_set(keys):
            missing = [rank for rank, key in enumerate(own) if not self._store.check([key])] or [0]
            seconds = time.monotonic() - started
            late = seconds > self._limit or self._abandoned.is_set()
            patience = MISSED_BEATS * BEAT_SECONDS if late else DEAD_SECONDS
            if dead := watch.dead(missing, read_heartbeats(self._store, self.world_size), patience):
                raise ProcessLost(f"cannot {what}: {dead}", fix=GO_ON)
            if late:
                ranks = ", ".join(f"rank {rank}" for rank in missing)
                raise ProcessLost(f"cannot {what}: {ranks} did not do its part within {seconds:.0f} s", fix=GO_ON)

    def _is_set(self, keys: Sequence[str]) -> bool:
        """Look for keys for a while, and return whether they are set.

        The store's own `wait` would do it, but PyTorch prints a warning whenever one ends without success.
        """
        end = time.monotonic() + min(LOOK_SECONDS, self._limit)
        while not self._store.check(list(keys)):
            if self._abandoned.wait(POLL_SECONDS) or time.monotonic() > end:
                return False
        return True


class _Watch:
    """Remembers since when each heartbeat has not changed."""

    def __init__(self, world_size: int) -> None:
        self._last = [(Heartbeat(-1), 0.0)] * world_size

    def dead(self, ranks: Sequence[int], heartbeats: Sequence[Heartbeat], seconds: float) -> str:
        """Describe those of these ranks that have had no heartbeat for so long; empty if there is none."""
        now, found = time.monotonic(), []
        for rank in ranks:
            heartbeat, since = self._last[rank]
            if heartbeats[rank].beat != heartbeat.beat:
                self._last[rank] = (heartbeats[rank], now)
            elif now - since > seconds:
                found.append(f"rank {rank} died or froze (last phase: {heartbeat.phase})")
        return "; ".join(found)
