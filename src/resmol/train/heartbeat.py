"""Heartbeats of the ranks: which rank died or froze, which is a straggler, and do all work on the same thing?

Each rank writes a heartbeat and its phase to torchrun's store once a second, from a thread. A collective fails when
a rank is gone, and after a while when one does not reach it; a rank whose collective fails reads the heartbeats to
name the rank that stopped. Everything in the store is JSON, nothing is a pickle.
"""

from __future__ import annotations

import itertools
import json
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import NamedTuple

import torch
import torch.distributed as dist

from resmol.errors import ConfigError, ProcessLost
from resmol.train.rendezvous import Store

BEAT_SECONDS = 1.0
MISSED_BEATS = 3  # a rank that misses so many died or froze
STRAGGLER_RATIO = 3.0  # a rank that computes so many times as long as the others is a straggler
STRAGGLER_SECONDS = 1.0  # but not below this: on a busy machine, short times differ by any factor
GO_ON = "run the same command again: it goes on from the last checkpoint"


class Heartbeat(NamedTuple):
    """What a rank writes once a second.

    Attributes:
        beat: Counts up.
        phase: What the rank does, in words.
        waiting: Whether it waits for the others in a collective.
    """

    beat: int = 0
    phase: str = "start"
    waiting: bool = False


class RankMonitor:
    """Writes this rank's heartbeat while the context is open, and reads those of the other ranks.

    Args:
        store: The store that the ranks share.
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._phase = Heartbeat().phase
        self._waiting_since: float | None = None
        self._waited, self._worked = 0.0, 0.0
        self._stopped = threading.Event()
        # The thread has a connection of its own: the store's may be blocked by a wait.
        self._thread = threading.Thread(target=self._run, args=(self._store.clone(),), name="heartbeat", daemon=True)

    def __enter__(self) -> RankMonitor:
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self, store: Store) -> None:
        with suppress(RuntimeError):  # the store is gone: so is torchrun, and with it the run
            for beat in itertools.count(1):
                store.set(_heartbeat_key(self._rank), json.dumps(self._heartbeat(beat)))
                if self._stopped.wait(BEAT_SECONDS):
                    return

    def set_phase(self, phase: str) -> None:
        """Set what this rank does from now on, in words for a person."""
        self._phase, self._waited = phase, 0.0

    def _heartbeat(self, beat: int) -> Heartbeat:
        return Heartbeat(beat, self._phase, self._waiting_since is not None)

    def waits(self) -> None:
        """Count the time from now on as waiting for the other ranks, to the end of the collective around it."""
        self._waiting_since = time.perf_counter()

    @contextmanager
    def collective(self, operation: str, *, computes: bool = False) -> Iterator[None]:
        """Surround an operation that all ranks take part in.

        Args:
            operation: Its name, for the message.
            computes: The ranks also compute in it: `waits` says from where on this one waits, and an error that does
                not come from the communication is left as it is.

        Raises:
            ProcessLost: The communication failed; the message names the ranks that died, froze or did not reach it.
        """
        started = time.perf_counter()
        if not computes:
            self.waits()
        try:
            yield
        except RuntimeError as error:
            if computes and not is_lost_connection(error):
                raise
            raise ProcessLost(self._describe_failure(operation, time.perf_counter() - started), fix=GO_ON) from error
        finally:
            if self._waiting_since is not None:
                self._waited += time.perf_counter() - self._waiting_since
            self._waiting_since = None

    def _describe_failure(self, operation: str, seconds: float) -> str:
        try:
            before = read_heartbeats(self._store, self._world_size)
            time.sleep(MISSED_BEATS * BEAT_SECONDS)
            after = read_heartbeats(self._store, self._world_size)
        except RuntimeError:
            return f"the {operation} failed, and torchrun's store cannot be reached"
        dead, absent = [], []
        for rank, last in enumerate(after):
            if rank != self._rank and last.beat == before[rank].beat:
                dead.append(f"rank {rank} died or froze (last phase: {last.phase})")
            elif rank != self._rank and not last.waiting:
                absent.append(
                    f"rank {rank} did not reach the {operation} within {seconds:.0f} s (last phase: {last.phase})"
                )
        return (
            "; ".join(dead + absent)
            or f"the {operation} failed, though all ranks are alive (last phase: {self._phase})"
        )

    def connect(self) -> Store:
        """Return another connection to the ranks' store, for one thread."""
        return self._store.clone()

    def check_consistent(self, facts: Mapping[str, str]) -> None:
        """Compare facts with those of all other ranks.

        Raises:
            ConfigError: They differ; all ranks raise it, and it names the first rank that differs from rank 0.
        """
        self._store.set(_facts_key(self._rank), json.dumps(dict(facts)))
        with self.collective("comparison"):  # `get` waits for a rank that has not written its facts yet
            all_facts = [json.loads(self._store.get(_facts_key(rank))) for rank in range(self._world_size)]
        for rank, theirs in enumerate(all_facts):
            for name, value in all_facts[0].items():
                if theirs.get(name) != value:
                    raise ConfigError(
                        f"rank {rank} has a different {name} from rank 0: {theirs.get(name)} instead of {value}",
                        fix="give all ranks the same command, data and installation",
                    )

    def count_work(self, seconds: float) -> None:
        """Add the seconds since `set_phase` to this rank's work, less those that it waited in collectives."""
        self._worked += seconds - self._waited

    def straggler(self) -> str:
        """Describe the rank that worked much longer than the others since the last call; empty if there is none.

        A collective of the hosts: all ranks must call it at the same step.
        """
        own = torch.tensor([self._worked], dtype=torch.float32)
        worked = [torch.empty_like(own) for _ in range(self._world_size)]
        with self.collective("all-gather"):
            dist.all_gather(worked, own)
        self._worked = 0.0
        return describe_straggler([float(seconds) for seconds in worked])


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether an error comes from the process group; gloo's are plain `RuntimeError`, named in their text."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def read_heartbeats(store: Store, world_size: int) -> list[Heartbeat]:
    """Return the last heartbeat of each rank (`RuntimeError`: the store is gone)."""
    keys = [_heartbeat_key(rank) for rank in range(world_size)]
    return [Heartbeat(*json.loads(store.get(key))) if store.check([key]) else Heartbeat() for key in keys]


def describe_straggler(seconds: list[float]) -> str:
    """Describe the rank that took much longer than the others for the same steps; empty if there is none.

    Args:
        seconds: The work of each rank; two ranks at least.
    """
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    usual = statistics.median(seconds[:slowest] + seconds[slowest + 1 :])
    if seconds[slowest] < STRAGGLER_SECONDS or seconds[slowest] < STRAGGLER_RATIO * usual:
        return ""
    return f"rank {slowest} worked {seconds[slowest]:.1f} s, the other ranks {usual:.1f} s"


def _heartbeat_key(rank: int) -> str:
    return f"resmol/heartbeat/{rank}"


def _facts_key(rank: int) -> str:
    return f"resmol/facts/{rank}"
