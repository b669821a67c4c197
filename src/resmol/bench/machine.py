"""The facts that a measurement belongs to: the machine, the versions, and which baselines are installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from resmol.errors import DataError, UsageError
from resmol.system.host import host_facts, usable_cores
from resmol.system.installation import install_hint

PRECISIONS = ("float32", "bfloat16")
BASELINE_PACKAGES = ("accelerate", "llama-cpp-python", "safetensors", "tokenizers", "transformers")


def machine_facts(threads: int) -> dict[str, Any]:
    """Return processor, system, versions and the number of threads (0: PyTorch's default); no host name, no path."""
    facts = {**host_facts(), "torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    found = {package: _version(package) for package in BASELINE_PACKAGES}
    versions = {package: number for package, number in found.items() if number}
    return {**facts, "processors": usable_cores(), "threads": threads or torch.get_num_threads(), **versions}


def require_baseline(baseline: str | None, known: Mapping[str, tuple[str, ...]]) -> None:
    """Raise `UsageError` for a baseline that is unknown, and `DataError` for one whose packages are not installed."""
    if baseline is None:
        return
    if baseline not in known:
        raise UsageError(f"there is no peer {baseline!r}", fix=f"choose one of: {', '.join(known)}")
    for package in known[baseline]:
        if _version(package) is None:
            extra = "interop" if package == "llama-cpp-python" else "verify"
            raise DataError(f"--peer {baseline} needs {package}", fix=f"install it: {install_hint(extra)}")


def require_precision(precision: str) -> None:
    """Raise `UsageError` for an arithmetic that is not compared."""
    if precision not in PRECISIONS:
        raise UsageError(f"--precision is {precision!r}", fix=f"choose {' or '.join(PRECISIONS)}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
