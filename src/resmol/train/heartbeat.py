"""The processes of a run watch each other: who is gone or frozen, who is slow, and do all work on the same thing?

Each process tells a store that they share (torchrun's) once a second, from a thread, that it lives and what it is at.
An operation of all processes fails when one of them is gone, and after a while when one does not come; whoever fails
reads there who has fallen silent, and says so. Nothing that travels is a pickle.
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
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from resmol.errors import ConfigError, ProcessLost

Store: TypeAlias = Any  # torch.distributed.Store; PyTorch's stubs lack some of its methods

BEAT_SECONDS = 1.0
SILENT_BEATS = 3  # without a sign of life for so many beats, a process is gone or frozen
SLOW_RATIO = 3.0  # slower than the others by this is worth a warning
SLOW_SECONDS = 1.0  # but not when all that is compared takes less: a busy machine would set it off
GOING_ON = "run the same command again: it goes on from the last checkpoint"


class RankMonitor:
    """All processes of a run, as one of them sees them; a context in which this one gives signs of life.

    Args:
        store: What the processes share.
        rank: The number of this one.
        world_size: How many there are.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._at = "its start"
        self._waiting, self._waited, self._worked = False, 0.0, 0.0
        self._ending = threading.Event()
        # The thread has a connection of its own: the store's may wait for an answer.
        self._thread = threading.Thread(
            target=self._beat, args=(self._store.clone(),), name="signs of life", daemon=True
        )

    def __enter__(self) -> RankMonitor:
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()

    def _beat(self, store: Store) -> None:
        with suppress(RuntimeError):  # the store is gone: so is torchrun, and with it the run
            for number in itertools.count():
                waiting = ", waiting for the others" if self._waiting else ""
                store.set(f"siblings/sign of {self._rank}", f"{number} {self._at}{waiting}")
                if self._ending.wait(BEAT_SECONDS):
                    return

    def begin(self, what: str) -> None:
        """Say what this process is at now, in words for a person."""
        self._at, self._waited = what, 0.0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Surround an operation that all processes take part in (`ProcessLost` when one of them does not)."""
        started, self._waiting = time.perf_counter(), True
        try:
            yield
        except RuntimeError as error:
            raise ProcessLost(self._name_the_lost(), fix=GOING_ON) from error
        finally:
            self._waiting = False
            self._waited += time.perf_counter() - started

    def _name_the_lost(self) -> str:
        try:
            before = self._signs()
            time.sleep(SILENT_BEATS * BEAT_SECONDS)
            after = self._signs()
        except RuntimeError:
            return "the processes cannot reach each other, nor torchrun"
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        silent = [rank for rank in others if before[rank] == after[rank]]
        absent = [rank for rank in others if not after[rank].endswith("waiting for the others")]
        named = [f"process {rank} is gone or frozen (last at {_doing(after[rank])})" for rank in silent]
        named += [
            f"process {rank} did not come (it is at {_doing(after[rank])})" for rank in absent if rank not in silent
        ]
        return "; ".join(named) or f"the processes lost each other at {self._at}"

    def _signs(self) -> list[str]:
        keys = [f"siblings/sign of {rank}" for rank in range(self._world_size)]
        return [self._store.get(key).decode() if self._store.check([key]) else "0 its start" for key in keys]

    def agree(self, facts: Mapping[str, str]) -> None:
        """Compare facts with those of all other processes.

        Raises:
            ConfigError: They differ; all processes raise it, and it names the first process that is unlike process 0.
        """
        self._store.set(f"siblings/facts of {self._rank}", json.dumps(dict(facts)))
        with self.together():  # waits for those that have not said theirs yet
            all_facts = [json.loads(self._store.get(f"siblings/facts of {rank}")) for rank in range(self._world_size)]
        for rank, theirs in enumerate(all_facts):
            for name, value in all_facts[0].items():
                if theirs.get(name) != value:
                    raise ConfigError(
                        f"process {rank} has another {name} than process 0: {theirs.get(name)} instead of {value}",
                        fix="give all processes the same command, data and installation",
                    )

    def count_work(self, seconds: float) -> None:
        """Add what was begun last and took so long; waiting for the others meanwhile is not this process's own work."""
        self._worked += seconds - self._waited

    def slowest(self, device: torch.device) -> str:
        """Say which process is much slower than the others since this was asked last; empty where none is.

        All processes must ask at the same step.
        """
        own = torch.tensor([self._worked], dtype=torch.float32, device=device)
        worked = [torch.empty_like(own) for _ in range(self._world_size)]
        with self.together():
            dist.all_gather(worked, own)
        self._worked = 0.0
        return describe_slowest([float(seconds) for seconds in worked])


def describe_slowest(seconds: list[float]) -> str:
    """Say which process took much longer than the others for the same steps; empty where none did.

    Args:
        seconds: What each process worked, two at least.
    """
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    usual = statistics.median(seconds[:slowest] + seconds[slowest + 1 :])
    if seconds[slowest] < SLOW_SECONDS or seconds[slowest] < SLOW_RATIO * usual:
        return ""
    return f"process {slowest} worked {seconds[slowest]:.1f} s where the others took {usual:.1f} s"


def _doing(sign: str) -> str:
    return sign.partition(" ")[2]
