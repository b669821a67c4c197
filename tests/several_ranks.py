"""Several ranks in one process: a thread for each, and DTensors that a group which sends nothing has made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from resmol.run.ranks import Ranks

Strategy = Literal["ddp", "fsdp", "hsdp"]
Group = Mapping[str, Tensor]
Result = TypeVar("Result")
PATIENCE = 300.0


class _Board:
    """Where threads leave messages, and wait until all have."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=PATIENCE)
        self.messages: list[Any] = [None] * world_size
        self.others: dict[int, _Board] = {}
        self.lock = threading.Lock()


class ThreadRanks(Ranks):
    """Ranks that are threads of one process."""

    def __init__(self, rank: int, board: _Board) -> None:
        super().__init__(rank, len(board.messages))
        self._board, self._threads = board, count()

    @classmethod
    def alone(cls, rank: int, world_size: int) -> ThreadRanks:
        """Return a rank that exchanges nothing."""
        return cls(rank, _Board(world_size))

    def exchange(self, what: str, message: Any) -> list[Any]:
        self._board.messages[self.rank] = message
        self._board.barrier.wait()
        result = list(self._board.messages)
        self._board.barrier.wait()
        return result

    def for_thread(self) -> ThreadRanks:
        with self._board.lock:
            board = self._board.others.setdefault(next(self._threads), _Board(self.world_size))
        return ThreadRanks(self.rank, board)

    def abandon(self) -> None:
        self._board.barrier.abort()


def on_all(world_size: int, work: Callable[[Ranks], Result]) -> list[Result | Exception]:
    """Do something on each rank at the same time; return what came of it on each, an error as well."""
    board = _Board(world_size)

    def run(rank: int) -> Result | Exception:
        try:
            return work(ThreadRanks(rank, board))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size, "rank") as pool:
        return list(pool.map(run, range(world_size)))


def held_by(files: Mapping[str, Group], strategy: Strategy, rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    """Return copies of tensors as a rank holds them: whole, or sharded as FSDP2 does it, with two replicas in HSDP."""
    ranks = torch.arange(world_size)
    if strategy == "ddp":
        return {file: {name: tensor.clone() for name, tensor in group.items()} for file, group in files.items()}
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        mesh = DeviceMesh("cpu", ranks.view(2, -1) if strategy == "hsdp" else ranks)
        placements = [Replicate(), Shard(0)] if strategy == "hsdp" else [Shard(0)]
        return {
            file: {name: _sharded(tensor, mesh, placements) for name, tensor in group.items()}
            for file, group in files.items()
        }
    finally:
        dist.destroy_process_group()


def _sharded(tensor: Tensor, mesh: DeviceMesh, placements: list[Any]) -> DTensor:
    whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    local = whole.redistribute(mesh, placements).to_local().clone()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.contiguous().stride()
    )
