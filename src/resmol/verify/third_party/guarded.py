"""Run third-party code: whatever it raises becomes a sentence with its own line and the phase that failed."""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from enum import Enum
from pathlib import Path
from typing import TypeVar

import torch

import resmol
from resmol.errors import CheckFailed, ResmolError

T = TypeVar("T")

MAX_MESSAGE = 300
_LIBRARIES = ("site-packages", "dist-packages")
_STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
_PACKAGE, _TORCH = Path(resmol.__file__).parent, Path(torch.__file__).parent


class Phase(Enum):
    """What third-party code was doing, and what to change where it failed."""

    IMPORTING = (
        "importing",
        "make the file importable: nothing but definitions at its top level, the rest under "
        "`if __name__ == '__main__':`",
    )
    BUILDING = (
        "building",
        "let the factory build the module from one argument: an annotated configuration class of yours is filled in; "
        "otherwise it gets an object that is a dict too, with the names of config.json",
    )
    FORWARD = ("forward", "let the module run with ids [B, T] (int64) alone; give other arguments a default")
    BACKWARD = (
        "backward",
        "let autograd follow the way from the parameters to the logits: without .detach(), .item(), numpy and "
        "in-place changes",
    )

    def __init__(self, title: str, fix: str) -> None:
        self.title = title
        self.fix = fix


def guarded(phase: Phase, action: Callable[[], T]) -> T:
    """Run third-party code; what it prints goes to standard error, which keeps ``--json`` clean.

    Raises:
        CheckFailed: It raised an exception, or tried to end the program.
    """
    try:
        with redirect_stdout(sys.stderr), _settings_kept():
            return action()
    except ResmolError:
        raise
    except (Exception, SystemExit) as error:  # third-party code can raise anything
        raise CheckFailed(f"{phase.title}: {_message(error)}{place_of(error)}", fix=_fix(phase, error)) from error


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Undo what third-party code changes for the whole process, and with it for the reference."""
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)


def place_of(error: BaseException) -> str:
    """Return the file, line and code at which an exception left the student's own code; empty if nobody knows.

    Frames of resmol, of the standard library and of installed packages come last: an error inside PyTorch has its
    reason in the line that called it.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return _written(error.filename, error.lineno or 0)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_inside(frame.filename, _PACKAGE)]
    own = [frame for frame in frames if not _is_library(frame.filename)]
    own = own or [frame for frame in frames if not _is_inside(frame.filename, _TORCH)]
    return _written(own[-1].filename, own[-1].lineno or 0) if own else ""


def _is_library(filename: str) -> bool:
    path = Path(filename)
    return (
        filename.startswith("<")
        or any(part in _LIBRARIES for part in path.parts)
        or _is_inside(filename, _STANDARD_LIBRARY)
    )


def _is_inside(filename: str, folder: Path) -> bool:
    return Path(filename).is_relative_to(folder)


def _written(filename: str, line: int) -> str:
    path = Path(filename)
    shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else filename
    code = linecache.getline(filename, line).strip()
    return f" ({shown}:{line}{f': `{code}`' if code else ''})"


def _message(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it ends the program: sys.exit({error.code})"
    text = " ".join(str(error).split())
    text = text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _fix(phase: Phase, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.partition(".")[0]
        return f"install {missing}, or import it only where it is used; a file of yours must lie beside the model's"
    return phase.fix
