"""Where a process computes and how it works with its siblings: passed in as a `Runtime`, never global.

One process is the ordinary case. Under ``torchrun`` every process takes its share of a step's micro-batches, and
the gradients, which are sums over tokens, are summed over the processes: two processes with one micro-batch each
give the bits of one process with two.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from resmol.config.run_config import RunConfig
from resmol.errors import ConfigError
from resmol.system.host import processor_field
from resmol.train.heartbeat import RankMonitor

PREPARED = "the main process is ready"  # a key of the store that the processes share
LONGEST_PREPARATION = timedelta(days=2)  # of a text, by the main process alone; if it dies, torchrun ends the others


@dataclass(frozen=True)
class Runtime:
    """One process of a run.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
        device: Where it computes.
        autocast_dtype: Type of the matrix products, or None for the type of the weights.
        siblings: The other processes; None where there are none.
    """

    rank: int
    world_size: int
    device: torch.device
    autocast_dtype: torch.dtype | None
    siblings: RankMonitor | None = None

    @property
    def is_main(self) -> bool:
        """Tell whether this process writes the files."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which forward passes run."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def all_reduce_sum(self, tensors: Iterable[Tensor]) -> None:
        """Add up each tensor over all processes, in place."""
        if self.world_size > 1:
            with self._together():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the main process's values of these tensors, in place."""
        if self.world_size > 1:
            with self._together():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    def any_rank(self, flag: bool) -> bool:
        """Tell whether the flag is set in any process; a barrier when there are several."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(int(flag), device=self.device)
        with self._together():
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
            return bool(votes.item())

    def begin(self, what: str) -> None:
        """Tell the siblings what this process is at now, for them to say if it does not come back."""
        if self.siblings is not None:
            self.siblings.begin(what)

    def _together(self) -> AbstractContextManager[None]:
        return nullcontext() if self.siblings is None else self.siblings.together()

    def environment(self) -> dict[str, str | int]:
        """Return the facts that bitwise equality depends on, and nothing else: no variable, no path, no secret."""
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor_name(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "world_size": self.world_size,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
        }


def _processor_name() -> str:
    return processor_field("model name") or platform.processor() or platform.machine()


def is_main_process() -> bool:
    """Tell whether this is the process that writes the files, also before there is a `Runtime`."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def open_runtime(config: RunConfig) -> Iterator[Runtime]:
    """Set up this process as the configuration (without ``auto``) and torchrun's environment say.

    Raises:
        ConfigError: The device does not exist here.
        ProcessLost: The processes do not find each other.
    """
    device = find_device(config.runtime.device)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    precision = torch.bfloat16 if config.runtime.precision == "bfloat16" else None
    with deterministic_kernels(device):
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield Runtime(0, 1, device, precision)
        else:
            with _process_group(device, config.runtime.collective_timeout) as siblings:
                yield Runtime(dist.get_rank(), dist.get_world_size(), device, precision, siblings)


@contextmanager
def _process_group(device: torch.device, timeout: int) -> Iterator[RankMonitor]:
    """Join the processes that torchrun's environment names; the main one may come late, it prepares the data first."""
    store, rank, world_size = next(rendezvous("env://"))
    wait = timedelta(seconds=timeout)
    store.set_timeout(wait)
    if rank == 0:
        store.set(PREPARED, "")
    with RankMonitor(store, rank, world_size) as siblings:
        with siblings.together():
            store.wait([PREPARED], LONGEST_PREPARATION)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
        try:
            yield siblings
        finally:
            dist.destroy_process_group()


@contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Let PyTorch choose kernels that give the same bits each time.

    Without it, threads add to the rows of the embedding's gradient in whatever order they arrive, also on a CPU.
    There, a kernel that PyTorch knows to be nondeterministic is an error; on CUDA it is a warning, since not every
    version has another one for all that is used here.
    """
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    memory.fill_uninitialized_memory = False  # nothing here reads memory that it did not write
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        memory.fill_uninitialized_memory = filled


def find_device(wanted: str) -> torch.device:
    """Return the device that ``runtime.device`` means here (`ConfigError` when it does not exist)."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("runtime.device is cuda, and there is no CUDA device here", fix="set runtime.device=cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
