"""A lock that one process holds at a time, on a directory that several may want to write to."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resmol.errors import RunInUse
from resmol.system.atomic_io import full_disk_is_an_error, make_directory

OWNER_PATIENCE_SECONDS = 1.0
MAX_OWNER_BYTES = 4096


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the directory of the lock file ``path`` for this process, by `flock`.

    The directory is made if it is missing. The kernel frees the lock when the process dies, however it dies.

    Raises:
        RunInUse: Another process holds it; the message names its process id and host.
    """
    make_directory(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunInUse(
                f"{path.parent} is in use by another process: {_owner_of(descriptor)}",
                fix="wait for it, stop it with Ctrl-C, or choose another run directory",
            ) from None
        with full_disk_is_an_error(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _owner_of(descriptor: int) -> str:
    """Return the content of a lock file, which names its owner.

    An owner writes its name just after it has the lock, so for an instant the file is empty, or names the process
    that held the lock before and is dead.
    """
    deadline = time.monotonic() + OWNER_PATIENCE_SECONDS
    while True:
        owner = os.pread(descriptor, MAX_OWNER_BYTES, 0).decode(errors="replace").strip()
        if _may_be_alive(owner) or time.monotonic() > deadline:
            return owner or "unknown"
        time.sleep(0.01)


def _may_be_alive(owner: str) -> bool:
    try:
        facts = json.loads(owner)
        if facts["host"] == socket.gethostname():
            os.kill(int(facts["pid"]), 0)  # signal 0 only asks
    except (ValueError, TypeError, KeyError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        return True  # alive, as another user's process
    return True
