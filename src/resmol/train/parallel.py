"""The device, rank and world size of this process, passed in as a `Runtime`, never global.

One process is the ordinary case. Under ``torchrun`` each rank takes its share of a step's micro-batches (data
parallelism), and the gradients, which are sums over tokens, are added up over the ranks by one of two strategies:
DDP (`gradients.py`) or FSDP2 (`sharding.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from resmol.config.run_config import RunConfig
from resmol.config.runtime_config import ParallelConfig
from resmol.errors import ConfigError
from resmol.run.ranks import ONE_RANK, Ranks
from resmol.system.host import host_facts
from resmol.system.launcher import Launch, this_launch
from resmol.system.wording import counted
from resmol.train.devices import deterministic_kernels, device_name, find_device, require_varlen
from resmol.train.heartbeat import RankMonitor
from resmol.train.portable import mkl_branch, require_portable
from resmol.train.rank_messages import RankMessages
from resmol.train.rendezvous import meet

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """Where this process computes, and its place among the ranks of the run.

    Attributes:
        rank: From 0.
        world_size: Number of ranks.
        device: Where it computes.
        autocast_dtype: Type of the matrix products, or None for the type of the weights.
        monitor: The heartbeats of the ranks; None if there is one rank.
        mesh: The ranks over which the weights are sharded, ``(shard)`` or ``(replicate, shard)``; None where each
            rank holds all of them.
    """

    rank: int
    world_size: int
    device: torch.device
    autocast_dtype: torch.dtype | None
    monitor: RankMonitor | None = None
    mesh: DeviceMesh | None = None

    @classmethod
    def single(cls, device: torch.device | str = "cpu", autocast_dtype: torch.dtype | None = None) -> Runtime:
        """Return the runtime of a process that has no other ranks."""
        return cls(0, 1, torch.device(device), autocast_dtype)

    @property
    def scales_loss(self) -> bool:
        """Whether gradients need a loss scale: float16 alone would round the small ones to zero."""
        return self.autocast_dtype is torch.float16

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which forward passes run."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    @property
    def sharding(self) -> str:
        """How the weights are shared by the ranks, as a fact that bitwise equality depends on."""
        if self.mesh is None:
            return "none"
        return "fsdp" if self.mesh.ndim == 1 else f"fsdp, {self.mesh.size(0)} replicas"

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Add up a tensor over all ranks, in place."""
        if self.world_size > 1:
            with self.collective("all-reduce"):
                dist.all_reduce(tensor)

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return, for each flag, whether it is set on any rank; a barrier when there are several ranks.

        Only the hosts meet: the flags lie on the CPU, so that nobody waits for a device.
        """
        if self.world_size == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32)
        with self.collective("all-reduce"):
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
            return [bool(vote) for vote in votes.tolist()]

    def ranks(self) -> Ranks:
        """Return the ranks of the run, for messages between them on a connection of their own."""
        if self.monitor is None:
            return ONE_RANK
        return RankMessages(self.monitor.connect(), self.rank, self.world_size)

    def set_phase(self, phase: str) -> None:
        """Publish what this rank does from now on: the other ranks name it if this one is lost."""
        if self.monitor is not None:
            self.monitor.set_phase(phase)

    def collective(self, operation: str, *, computes: bool = False) -> AbstractContextManager[None]:
        """Return the context of an operation that all ranks take part in (`RankMonitor.collective`)."""
        return nullcontext() if self.monitor is None else self.monitor.collective(operation, computes=computes)

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Surround forward passes without a backward pass, in which ranks that share a model gather its weights."""
        if self.mesh is None:
            yield
            return
        with self.collective("gathering of the weights"):
            try:
                yield
            finally:
                cast("Any", model).reshard()  # FSDP2 would leave those of the root for a backward pass

    def environment(self) -> dict[str, str | int]:
        """Return the facts that bitwise equality depends on, and nothing else: no variable, no path, no secret."""
        return {
            **host_facts(),
            "torch": torch.__version__,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "mkl": mkl_branch(),
            "threads": torch.get_num_threads(),
            "world_size": self.world_size,
            "sharding": self.sharding,
            "device": device_name(self.device),
        }


def check_ranks(config: RunConfig, world_size: int) -> None:
    """Refuse what the ranks that were started cannot do; the same on each of them (`ConfigError`)."""
    count = config.grad_accum_steps
    if count % world_size:
        nearest = min((n for n in range(1, count + 1) if count % n == 0), key=lambda n: abs(n - world_size))
        raise ConfigError(
            f"{count} micro-batches a step do not divide by {world_size} ranks; the nearest number that fits is "
            f"{nearest}",
            fix=f"start {counted(nearest, 'rank')}, or choose batch.micro_batch_size or batch.global_batch_tokens so "
            "that the number of ranks divides the micro-batches of a step",
        )
    if problem := _contradiction(config, world_size):
        raise ConfigError(
            problem,
            fix="start as many ranks as fit with torchrun (docs/distributed.md), or hold the whole model in each: "
            "--set parallel.strategy=ddp --set parallel.replicas=1",
        )


def _contradiction(config: RunConfig, world_size: int) -> str:
    strategy, replicas = config.parallel.strategy, config.parallel.replicas
    if strategy == "ddp":
        only = "parallel.strategy is ddp, where each rank holds the whole model: only fsdp has replicas"
        return f"parallel.replicas is {replicas}, and {only}" if replicas > 1 else ""
    if world_size == 1:
        return "parallel.strategy is fsdp, and there is one rank, which has no other to share the model with"
    if world_size % replicas:
        return f"parallel.replicas is {replicas}, which does not divide the {world_size} ranks"
    if world_size == replicas:
        return f"parallel.replicas is {replicas}, as many as there are ranks: fsdp would share nothing"
    if config.optimizer.name == "muon":
        return "optimizer.name is muon, which needs whole matrices, and parallel.strategy is fsdp, which shards them"
    return ""


@contextmanager
def open_runtime(config: RunConfig) -> Iterator[Runtime]:
    """Set up this process by the configuration (without ``auto``) and torchrun's environment variables.

    Raises:
        ConfigError: The device does not exist here, or lacks an attention; or a portable run finds other kernels.
        UsageError: The launcher's variables are no whole set.
        ProcessLost: The ranks cannot connect to each other.
    """
    launch = this_launch()
    device = find_device(config.runtime.device)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    precision = AUTOCAST.get(config.runtime.precision)
    require_portable(config)
    require_varlen(config, device)
    with nullcontext() if config.runtime.determinism == "off" else deterministic_kernels(device):
        if launch.world_size == 1:
            yield Runtime.single(device, precision)
        else:
            timeout = timedelta(seconds=config.runtime.collective_timeout)
            with _process_group(launch, device, timeout) as monitor:
                with monitor.collective("rendezvous"):
                    mesh = _mesh(config.parallel, device, timeout)
                yield Runtime(launch.rank, launch.world_size, device, precision, monitor, mesh)


@contextmanager
def _process_group(launch: Launch, device: torch.device, wait: timedelta) -> Iterator[RankMonitor]:
    """Initialize the process group by torchrun's environment variables."""
    store = meet(launch, wait)
    with RankMonitor(store, launch.rank, launch.world_size) as monitor:
        with monitor.collective("rendezvous"):
            backend = dist.get_default_backend_for_device(device)
            if device.type != "cpu":  # the hosts talk to each other as well (`Runtime.any_rank`)
                backend = f"cpu:{dist.get_default_backend_for_device('cpu')},{device.type}:{backend}"
            dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=wait)
        try:
            yield monitor
        finally:
            dist.destroy_process_group()


def _mesh(config: ParallelConfig, device: torch.device, wait: timedelta) -> DeviceMesh | None:
    """Return the ranks as FSDP shards over them: a row, or a row for each replica of the model; None for DDP."""
    if config.strategy == "ddp":
        return None
    if config.replicas == 1:
        return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
    grid = torch.arange(dist.get_world_size()).view(config.replicas, -1)
    groups = [dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=wait)[0] for ranks in (grid.T, grid)]
    return DeviceMesh.from_group(groups, device.type, mesh=grid, mesh_dim_names=("replicate", "shard"))
