"""Faults between a process and its disk: the Python side of shim.c, for use in a child of the fork server.

`build` compiles the library, once a session; the fork server is started with it in LD_PRELOAD, where it sleeps in every
child (fixture ``shim`` in conftest.py: it skips the test where there is no compiler). A child wakes it up::

    import shim

    def child(run, setting, k):  # started with forks.run(child, ...)
        shim.arm(run, "exit-before", k=k)  # dies, with exit code 137, before the k-th effect below run
        shim.arm(run, "fail", kinds=("write",), k=3, errno=errno.EIO)  # the 3rd write fails, once
        shim.arm(run, "fail", kinds=("write",), k=3, until=shim.EVER, errno=errno.ENOSPC)  # it and all later ones
        shim.arm(run, "fail", kinds=("fsync",), k=1, errno=errno.EIO, names="manifest.json")
        shim.arm(run, "short", kinds=("write",), k=1, until=shim.EVER)  # every write writes one byte
        shim.arm(run, "sleep", kinds=("fsync",), k=1, until=shim.EVER, milliseconds=5000)
        shim.arm(run, "count", log=path)  # acts on nothing; writes the log of K3
        ...
        return shim.disarm()  # how many matching calls there were

Arming again replaces what was armed before and counts from 1. Only calls that concern files below the directory given
first count, and of those only the ``kinds`` (default: all that change something) whose file has a name like ``names``.
Every thread counts, and what an armed process forks is armed as well. Calls that bypass the C library are not seen.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODES = ("count", "exit-before", "exit-after", "exit-torn", "fail", "short", "sleep")
KINDS = {
    "create": 1,  # open with O_CREAT or O_TRUNC
    "read": 2,  # any other open
    "write": 4,  # write, pwrite, writev, pwritev
    "fsync": 8,  # fsync, fdatasync
    "rename": 16,
    "unlink": 32,
    "mkdir": 64,
    "rmdir": 128,
    "truncate": 256,  # ftruncate
    "sync-directory": 512,  # fsync of a directory
    "map": 1024,  # mmap of a file
    "lock": 2048,  # flock
}
EFFECTS = tuple(kind for kind, number in KINDS.items() if kind != "read" and number <= 256)
EVER = 2**62
KILLED = 137  # the exit code of a process that the shim ended


@dataclass(frozen=True)
class Operation:
    """One effect on the disk, as the log has it; ``mark`` is a word of the test itself.

    Attributes:
        kind: One of EFFECTS, or ``mark`` (its text is in ``path``).
        path: The file, absolute.
        to: The new name, for a rename.
        offset: Where a write begins; the new length, for a truncate.
        data: What was written.
    """

    kind: str
    path: str
    to: str = ""
    offset: int = 0
    data: bytes = b""


def build(folder: Path) -> Path:
    """Compile the library into ``folder``.

    Raises:
        FileNotFoundError: There is no compiler, or this is not Linux.
        subprocess.CalledProcessError: It does not compile here.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        raise FileNotFoundError("the shim needs Linux and a C compiler")
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = [compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def arm(
    root: Path, mode: str, *, kinds: Sequence[str] = EFFECTS, k: int = 1, until: int | None = None, errno: int = 0,
    milliseconds: int = 0, names: str = "*", log: Path | None = None,
) -> None:  # fmt: skip
    """Wake the shim up in this process.

    Args:
        root: Calls that concern this directory or what is below it count; nothing else does.
        mode: One of MODES. "exit-torn" writes the first half of a write's bytes and dies (other calls: as exit-after).
        kinds: Which calls count; see KINDS.
        k: The first one to act on, from 1.
        until: The last one to act on; ``k`` if not given.
        errno: What a call fails with, in mode "fail".
        milliseconds: How long a call takes, in mode "sleep".
        names: Only files with a name like this (a shell pattern) count.
        log: Append every effect to this file (it must lie outside ``root``), whatever the mode.
    """
    which = sum(KINDS[kind] for kind in kinds)
    last = k if until is None else until
    arguments = (MODES.index(mode), which, k, last, errno, milliseconds, names.encode(), str(log or "").encode())
    if _library().fault_arm(str(root).encode(), *arguments) != 0:
        raise OSError(f"the shim cannot watch {root}")


def disarm() -> int:
    """Let it sleep again; return how many calls counted."""
    return int(_library().fault_disarm())


def count() -> int:
    """Return how many calls counted so far."""
    return int(_library().fault_count())


def mark(text: str) -> None:
    """Write a word of the test into the log, between the effects."""
    _library().fault_mark(text.encode())


def read_log(path: Path) -> list[Operation]:
    """Return the operations of a log, in the order in which they happened."""
    content, operations = path.read_bytes(), []
    while content:
        line, _, content = content.partition(b"\n")
        kind, name, to, offset, length = line.decode().split("\t")
        operations.append(Operation(kind, name, to, int(offset), content[: int(length)]))
        content = content[int(length) :]
    return operations


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    if not hasattr(library, "fault_arm"):
        raise RuntimeError("this process was not started with the shim: use the fixtures forks and shim")
    numbers = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_int, ctypes.c_int)
    library.fault_arm.argtypes = (ctypes.c_char_p, *numbers, ctypes.c_char_p, ctypes.c_char_p)
    library.fault_mark.argtypes = (ctypes.c_char_p,)
    library.fault_disarm.restype = library.fault_count.restype = ctypes.c_long
    return library
