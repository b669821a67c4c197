"""Let resmol see a system without POSIX, in every process that has this folder in PYTHONPATH.

Python imports this file when it starts. Modules of resmol, and they alone, then find a standard library that lacks what
Windows lacks: `fcntl` and its kind cannot be imported, `os`, `signal` and `select` have no POSIX names, and
`sys.platform` is "win32". Libraries see the real system, so their own portable sides are not tried here.

A file that this process has open or mapped can be neither renamed nor removed, nor can a folder be renamed that holds
one. Only the lock of a run is excepted, which filelock's POSIX side removes while it has it.
"""

from __future__ import annotations

import builtins
import enum
import errno
import os
import select
import signal
import stat
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

MODULES = frozenset("""fcntl grp posix pty pwd readline resource spwd syslog termios tty _posixsubprocess""".split())
NAMES = {
    "os": frozenset(
        """WEXITSTATUS WIFEXITED WIFSIGNALED WNOHANG WTERMSIG O_ASYNC O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC
        O_LARGEFILE O_NDELAY O_NOATIME O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH O_RSYNC O_SYNC O_TMPFILE chown
        chroot confstr copy_file_range environb eventfd fchdir fchown fdatasync fork forkpty fstatvfs
        getegid getenvb geteuid getgid getgroups getloadavg getpgid getpgrp getpriority getresuid getsid
        getuid getxattr initgroups killpg lchown listxattr lockf lstatvfs major makedev memfd_create minor
        mkfifo mknod nice openpty pathconf pidfd_open pipe2 posix_fadvise posix_fallocate posix_spawn pread
        preadv pwrite pwritev readv register_at_fork removexattr sched_getaffinity sched_setaffinity
        sched_yield sendfile setegid seteuid setgid setgroups setns setpgid setpriority setsid setuid
        setxattr splice statvfs sync sysconf tcgetpgrp ttyname uname unshare wait wait3 wait4 waitid
        writev""".split()
    ),
    "signal": frozenset(
        {name for name in dir(signal) if name.startswith("SIG") and isinstance(getattr(signal, name), signal.Signals)}
        - {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"}
        | {"alarm", "getitimer", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "siginterrupt", "sigpending"}
    ),
    "select": frozenset({name for name in dir(select) if name != "select" and not name.startswith("__")} - {"error"}),
}  # fmt: skip


class _Module(types.ModuleType):
    """A module of the standard library without some names, and with others in place of its own."""

    def __init__(self, real: types.ModuleType, hidden: frozenset[str], **instead: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(_real=real, _hidden=hidden, **instead)

    def __getattr__(self, name: str) -> Any:
        if name in self._hidden:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} on Windows")
        return getattr(self._real, name)


def _windows_modules() -> dict[str, types.ModuleType]:
    numbers = {member.name: member.value for member in signal.Signals if member.name not in NAMES["signal"]}
    signals = enum.IntEnum("Signals", {**numbers, "SIGBREAK": int(signal.SIGUSR2)})
    broken_off = {"Signals": signals, "SIGBREAK": signals.SIGBREAK, "CTRL_BREAK_EVENT": int(signal.SIGUSR2)}
    return {
        "os": _Module(os, NAMES["os"], name="nt"),
        "signal": _Module(signal, NAMES["signal"], **broken_off),
        "select": _Module(select, NAMES["select"]),
        "subprocess": _Module(subprocess, frozenset(), CREATE_NEW_PROCESS_GROUP=0),
        "sys": _Module(sys, frozenset(), platform="win32"),
    }


def _files_in_use() -> Iterator[str]:
    """Yield the regular files that this process has open or mapped."""
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if stat.S_ISREG(os.stat(f"/proc/self/fd/{entry}").st_mode):
                yield os.readlink(f"/proc/self/fd/{entry}")
    with open("/proc/self/maps", encoding="utf-8") as maps:
        yield from {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "/" in line}


def _refusing(change: Callable[..., None]) -> Callable[..., None]:
    """Return a rename or removal that fails as on Windows where a file is in use."""

    def changed(path: Any, *rest: Any, **more: Any) -> None:
        folder, name = more.get("dir_fd", more.get("src_dir_fd")), os.path.abspath(os.fspath(path))
        if folder is not None:
            name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fspath(path))
        used = {file for file in _files_in_use() if file == name or file.startswith(f"{name}/")}
        if used and os.path.basename(name) != "lock":
            raise PermissionError(errno.EACCES, f"in use by this process: {sorted(used)}", name)
        change(path, *rest, **more)

    return changed


def install() -> None:
    """Put it in place for all that is imported from now on."""
    os.rename, os.replace = _refusing(os.rename), _refusing(os.replace)
    os.unlink, os.remove = _refusing(os.unlink), _refusing(os.remove)
    real_import, windows = builtins.__import__, _windows_modules()

    def import_module(name: str, globals: Any = None, *rest: Any, **more: Any) -> Any:  # noqa: A002 - its name there
        importer = str((globals or {}).get("__name__", ""))
        if importer == "resmol" or importer.startswith("resmol."):
            if name in MODULES:
                raise ModuleNotFoundError(f"No module named {name!r} (on Windows)")
            if name in windows:
                return windows[name]
        return real_import(name, globals, *rest, **more)

    builtins.__import__ = import_module


if os.environ.get("RESMOL_TEST_SYSTEM") == "windows":
    install()
