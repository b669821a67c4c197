"""Bits that travel: whether PyTorch and MKL here compute what any x86-64 processor computes.

Both choose kernels by the processor when they are loaded, so `process_setup.set_up_process` sets two variables before:

* ``ATEN_CPU_CAPABILITY=default``: PyTorch's own kernels use SSE2 alone, and no fused multiply-add.
* ``MKL_CBWR=COMPATIBLE``: MKL's products sum in an order that Intel's and other processors share.

What remains is MKL's vector math, which the second does not reach: its square root begins at ``rsqrtps``, whose table
each maker fills in differently. Training does not call it (`optimizer.gradient_norm`).
"""

from __future__ import annotations

from pathlib import Path

import torch

from resmol.config.run_config import RunConfig
from resmol.errors import ConfigError
from resmol.system.mkl import mkl_reproducibility
from resmol.system.process_setup import PORTABLE_VARIABLES


def mkl_branch() -> str:
    """Return in which order MKL sums here, such as "off" or "compatible"; "none" where PyTorch has no MKL to ask."""
    return mkl_reproducibility(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")


def portability_problem() -> str:
    """Return why this process does not compute portable bits; empty where it does."""
    capability, branch = torch.backends.cpu.get_cpu_capability(), mkl_branch()
    if branch == "none":
        return "PyTorch has no MKL that can be asked (on x86-64 Linux it has)"
    found = [f"PyTorch's kernels are {capability}"] if capability != "DEFAULT" else []
    found += [f"MKL's reproducibility is {branch}"] if branch != "compatible" else []
    return " and ".join(found)


def require_portable(config: RunConfig) -> None:
    """Refuse a portable run in a process that was not set up for it (`ConfigError`)."""
    if config.runtime.determinism == "portable" and (problem := portability_problem()):
        variables = " ".join(f"{name}={value}" for name, value in PORTABLE_VARIABLES.items())
        raise ConfigError(
            f"runtime.determinism is portable, and {problem} in this process",
            fix=f"start Python with {variables} in its environment: PyTorch reads them when it is imported; "
            "`resmol train` sets them by itself",
        )
