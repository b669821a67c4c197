"""Whether `torch.compile` works here: asked once, before a run depends on it.

It needs a C++ compiler (on CUDA Triton, which needs a C compiler) and a folder in which programs may run. Any of these
may be missing or broken in ways that only an attempt finds.
"""

from __future__ import annotations

import functools
import shutil

import torch
from torch import Tensor

from resmol.config.run_config import RunConfig
from resmol.errors import ConfigError

SHOWN_CHARACTERS = 200


def has_compiler() -> bool:
    """Return whether there is a C++ compiler, which torch.compile needs on a CPU."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@functools.cache
def compiler_problem(device_type: str) -> str:
    """Return why torch.compile does not work on this kind of device, empty where it does.

    A line of code is compiled and executed. That takes seconds, most of which a compiled run would take anyway: for
    loading the compiler.
    """
    if not has_compiler():
        return "there is no C++ compiler here"
    try:
        torch.compile(_line, dynamic=False)(torch.ones(64, device=device_type))
    except Exception as error:  # of PyTorch's compiler, the C++ compiler's, the loader's, ...
        return first_sentence(error)
    return ""


def _line(values: Tensor) -> Tensor:
    return values.sin() + 1


def require_compiler(config: RunConfig, device_type: str) -> None:
    """Refuse ``runtime.compile=on`` where torch.compile does not work (`ConfigError`)."""
    if config.runtime.compile == "on" and (problem := compiler_problem(device_type)):
        raise broken_compiler(problem)


def broken_compiler(problem: str) -> ConfigError:
    """Return the error for a configuration that asks for a compiler which does not work."""
    return ConfigError(
        f"runtime.compile is on, and torch.compile does not work here: {problem}",
        fix="install a C++ compiler, or set TORCHINDUCTOR_CACHE_DIR to a folder in which programs may run; or train "
        "uncompiled: --set runtime.compile=off (in a run that has begun also --accept-drift runtime.compile)",
    )


def first_sentence(error: Exception) -> str:
    """Return the kind of an error of PyTorch's compiler, and the beginning of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."
