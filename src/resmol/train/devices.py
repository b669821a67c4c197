"""The devices: which one is taken, and what it can do. Nothing else names a kind of accelerator.

A process has one accelerator at most (`torch.accelerator`). docs/where-it-runs.md says what each kind promises.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from resmol.config.load import load_preset
from resmol.config.run_config import RunConfig
from resmol.config.runtime_config import DeviceKind
from resmol.errors import ConfigError
from resmol.model.llama import CausalLM
from resmol.model.varlen_attention import HAS_VARLEN
from resmol.system import host
from resmol.system.launcher import this_launch

KNOWN = ("cpu", "cuda")  # `auto` tries the others on a small model first: nobody has trained on them yet
VARLEN = ("cuda",)  # have a kernel for sequences of varying length
RUN_AHEAD = ("cuda",)  # compute beside the host, and copy to and from memory that is pinned
COMPILED = ("cuda", "xpu")  # accelerators whose kernels torch.compile has long written
_ACTIVITIES = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}


def find_device(wanted: str) -> torch.device:
    """Return the device that ``runtime.device`` names on this machine (`ConfigError` when it does not exist)."""
    return choose_device(wanted)[0]


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """Return the device that ``runtime.device`` names on this machine, and what ``auto`` has decided by.

    Raises:
        ConfigError: It does not exist.
    """
    found = None if wanted == "cpu" else _accelerator()
    if wanted not in ("auto", "cpu") and (found is None or found.type != wanted):
        there = "no accelerator" if found is None else found.type
        raise ConfigError(
            f"runtime.device is {wanted}, and PyTorch {torch.__version__} finds {there} here",
            fix=f"set runtime.device={'cpu' if found is None else found.type}, or install a PyTorch that has {wanted}",
        )
    if found is None:
        return torch.device("cpu"), "device: cpu (PyTorch finds no accelerator here)" if wanted == "auto" else ""
    if wanted == "auto" and found.type not in KNOWN and (problem := device_problem(found.type)):
        return torch.device("cpu"), f"device: cpu (a small model fails on {found.type}: {problem})"
    if torch.accelerator.device_count() > 1:
        torch.accelerator.set_device_index(this_launch().local_rank)
    device = torch.device(found.type, this_launch().local_rank)
    reason = f"device: {found.type} ({device_name(device)}; `--set runtime.device=cpu` takes the processor)"
    return device, reason if wanted == "auto" else ""


def _accelerator() -> torch.device | None:
    """Return the accelerator here, if it is of a kind that a configuration can name."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None and found.type in get_args(DeviceKind) else None


@functools.cache
def device_problem(kind: str) -> str:
    """Return why the loss of a small model and its gradient cannot be computed on a device, empty where they can."""
    model = CausalLM.empty(load_preset("nano").model)
    model.init_weights(0)
    ids = torch.arange(8).view(1, 8)
    device = torch.device(kind)
    try:
        with deterministic_kernels(device):
            model.to(device)
            loss = model.loss(ids.to(device), ids.to(device))
            loss.backward()
            finite = bool(loss.isfinite())
    except Exception as error:  # an operation that is not there raises several kinds of them
        return next(iter(str(error).splitlines()), type(error).__name__)
    return "" if finite else "its loss is not finite"


@contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Let PyTorch choose kernels that give the same bits each time.

    Without it, threads add to the rows of the embedding's gradient in whatever order they arrive, also on a CPU.
    There, a kernel that PyTorch knows to be nondeterministic is an error; on an accelerator it is a warning, since some
    versions have no deterministic kernel for an operation that is used here.
    """
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    memory.fill_uninitialized_memory = False  # nothing here reads memory that it did not write
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        memory.fill_uninitialized_memory = filled


def device_name(device: torch.device) -> str:
    """Return what an accelerator is called; of a processor, and where PyTorch does not say, the kind."""
    ask = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if device.type == "cpu" or ask is None else str(ask(device))


def has_bfloat16(device: torch.device) -> bool:
    """Return whether an accelerator multiplies bfloat16 by a unit for it: a T4 or a P100 would emulate it, slowly."""
    ask = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return ask is not None and bool(ask(including_emulation=False))


def has_float16(device: torch.device) -> bool:
    """Return whether an accelerator computes faster in float16 than in float32, and training in it is known to work.

    Among CUDA devices these are the P100 (compute capability 6.0; the other cards of its generation are slower) and all
    from 7.0 on, such as the V100 and the T4.
    """
    ask = getattr(torch.get_device_module(device), "get_device_capability", None) if device.type == "cuda" else None
    if ask is None:
        return False
    major, minor = ask(device)
    return major >= 7 or (major, minor) == (6, 0)


def require_varlen(config: RunConfig, device: torch.device) -> None:
    """Refuse ``runtime.attention = varlen`` where PyTorch has no such kernel (`ConfigError`)."""
    if config.runtime.attention != "varlen":
        return
    if not HAS_VARLEN:
        lacks = f"PyTorch {torch.__version__} has no such attention"
    elif device.type not in VARLEN:
        lacks = f"PyTorch has it for {' and '.join(VARLEN)}, and the device is {device.type}"
    elif not config.runtime.is_low_precision:
        lacks = f"it is there for half precision, and runtime.precision is {config.runtime.precision}"
    else:
        return
    raise ConfigError(f"runtime.attention is varlen: {lacks}", fix="set runtime.attention=sdpa")


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes for each process of a run on this machine, or None where they are unknown.

    An accelerator without memory of its own (a Mac's) shares that of the processor.
    """
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    if ask is not None:
        return int(ask(device)[0])
    free = host.free_memory()
    return None if free is None else free // this_launch().local_world_size


def runs_ahead(device: torch.device) -> bool:
    """Return whether a device computes beside the host, so that the host may ask for more before it has the results."""
    return device.type in RUN_AHEAD


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; where that can happen beside the host, it does not wait for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if runs_ahead(device) else tensor.to(device)


class Reading:
    """Numbers that a device computes, on their way to the host, which goes on until it asks for them.

    Only what was asked of the device before is waited for: a ``float(tensor)`` waits for all that was asked since, too.

    Args:
        tensor: The numbers; nothing may change them.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.Event | None = None
        self._copy = tensor
        if runs_ahead(tensor.device):
            self._copy = tensor.to("cpu", non_blocking=True)
            self._arrived = torch.Event(tensor.device)
            self._arrived.record()

    def read(self) -> Any:
        """Wait for the numbers; return a number, or a list of them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()


def is_compiled(device: torch.device) -> bool:
    """Return whether ``auto`` compiles on an accelerator, if it works; on a processor that depends on the run."""
    return device.type in COMPILED


def profiler_activities(device: torch.device) -> list[ProfilerActivity]:
    """Return what PyTorch's profiler has to watch."""
    return [ProfilerActivity.CPU, *([_ACTIVITIES[device.type]] if device.type in _ACTIVITIES else [])]
