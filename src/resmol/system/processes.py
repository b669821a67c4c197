"""Other processes: whether one is alive; starting one that this one alone interrupts or kills; limiting its memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psutil


def is_running(process_id: int) -> bool:
    """Return whether there is a process of this id, whoever it belongs to.

    `os.kill(process_id, 0)` asks the same on POSIX; on Windows it would interrupt the process.
    """
    return bool(psutil.pid_exists(process_id))


def start_apart(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process that Ctrl-C at the terminal does not reach, as the leader of a group of its own.

    Args:
        command: The program and its arguments.
        options: More arguments of `subprocess.Popen`.
    """
    if sys.platform == "win32":
        return subprocess.Popen(command, creationflags=subprocess.CREATE_NEW_PROCESS_GROUP, **options)
    else:
        return subprocess.Popen(command, start_new_session=True, **options)


def ask_to_stop(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process that `start_apart` started.

    On Windows that is Ctrl-Break, whichever is asked for: all others would end it at once.
    """
    if sys.platform == "win32":
        process.send_signal(signal.CTRL_BREAK_EVENT)
    else:
        process.send_signal(number)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that `start_apart` started, and those that it started, and wait until it has ended."""
    if sys.platform == "win32":
        with suppress(psutil.NoSuchProcess):
            for descendant in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    descendant.kill()
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def limit_private_memory(process: subprocess.Popen[bytes], memory_bytes: int) -> None:
    """Limit the private memory of a process (``RLIMIT_DATA``); only Linux limits another process."""
    if hasattr(psutil, "RLIMIT_DATA"):
        psutil.Process(process.pid).rlimit(psutil.RLIMIT_DATA, (memory_bytes, memory_bytes))
