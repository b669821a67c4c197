"""How the ranks of one start find each other: a part of torchrun's store that belongs to this start alone.

After a failure ``torchrun --max-restarts`` starts the ranks again beside the same store, which still holds what the
dead ranks wrote (PyTorch 2.13): the addresses of their process group, too. A rank that read one of those would wait
for a process that is gone. Restart counts tell rounds apart on one node only; each agent counts for itself. So rank 0
names the start, and tells the name to those that are alive.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from resmol.errors import ProcessLost
from resmol.system.launcher import VARIABLES, Launch

logger = logging.getLogger(__name__)

Store: TypeAlias = Any  # torch.distributed.Store; PyTorch's stubs lack some of its methods

SILENT_SECONDS = 10  # of waiting for the other ranks before that is logged
POLL_SECONDS = 0.05
LONGEST_PREPARATION = timedelta(days=2)  # of a text, by rank 0 alone; if it dies, torchrun ends the others


def meet(launch: Launch, wait: timedelta) -> Store:
    """Return the store of this start, when all ranks have reached it; the others wait until rank 0 is ready.

    Args:
        launch: This rank and their number.
        wait: How long rank 0 waits for the others.

    Raises:
        ProcessLost: The store does not answer, or a rank does not come.
    """
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    place = f"rank {launch.rank} of {launch.world_size}"
    note = threading.Timer(SILENT_SECONDS, logger.info, [f"{place} waits for the others at {address}"])
    note.daemon = True
    note.start()
    try:
        store: Store = next(rendezvous("env://", timeout=wait))[0]
        store.set_timeout(wait)
        name = _gather(store, launch.world_size, wait) if launch.rank == 0 else _join(store, launch.rank)
    except dist.DistError as error:
        raise ProcessLost(
            f"{place} did not meet the others at {address} (MASTER_ADDR, MASTER_PORT): {str(error).splitlines()[0]}",
            fix=f"start all ranks with torchrun; if RANK and WORLD_SIZE are left over, unset {' '.join(VARIABLES)}",
        ) from error
    finally:
        note.cancel()
    return torch.distributed.PrefixStore(name, store)  # type: ignore[attr-defined]


def _join(store: Store, rank: int) -> str:
    """Write a name that no other process has, wait until rank 0 answers to it, and return the name of the start."""
    own = uuid.uuid4().hex
    store.set(_hello(rank), own)
    store.wait([_answer(own)], LONGEST_PREPARATION)
    start: str = store.get(_answer(own)).decode()
    store.set(_joined(start, rank), "")
    return start


def _gather(store: Store, world_size: int, wait: timedelta) -> str:
    """Answer to every name that is written until all living ranks have joined; return the name of the start."""
    start, deadline = uuid.uuid4().hex, time.monotonic() + wait.total_seconds()
    while missing := [rank for rank in range(1, world_size) if not store.check([_joined(start, rank)])]:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"rank {missing[0]} did not come within {wait.total_seconds():.0f} s")
        for rank in missing:
            if store.check([_hello(rank)]):
                store.set(_answer(store.get(_hello(rank)).decode()), start)
        time.sleep(POLL_SECONDS)
    return start


def _hello(rank: int) -> str:
    return f"resmol/hello/{rank}"


def _answer(name: str) -> str:
    return f"resmol/answer/{name}"


def _joined(start: str, rank: int) -> str:
    return f"resmol/joined/{start}/{rank}"
