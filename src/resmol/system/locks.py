"""Locks: one process at a time may write to a directory, and what is being read is not removed.

A lock of the kernel ends with its process, however that dies. Some file systems have none (a Lustre mount without
``flock``, NFS without its lock daemon, some FUSE mounts); there a file stands for the lock.

Windows lets nobody else read or write the byte that is locked, the first one, so the owner's name begins behind it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from resmol.errors import RunInUse
from resmol.system.atomic_io import OPEN_FILES_STAY, full_disk_is_an_error, make_directory
from resmol.system.processes import is_running

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

OWNER_PATIENCE_SECONDS = 1.0
MAX_OWNER_BYTES = 4096
OWNER_STARTS = 1  # in the lock file
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
WITHOUT_LOCKS = ".soft"  # the ending of the file that stands for a lock


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the directory of the lock file ``path`` for this process.

    The directory is made if it is missing, and removed again if nothing else came into it. The kernel frees the lock
    when the process dies. Where the file system has no locks, a file beside ``path`` stands for it; one that a dead
    process of this host left behind is taken over.

    Raises:
        RunInUse: Another process holds it; the message names its process id and host.
    """
    made = not path.parent.exists()
    make_directory(path.parent)
    lock = _locked(path)
    try:
        owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
        with full_disk_is_an_error(path), path.open("r+b" if path.exists() else "wb", buffering=0) as file:
            file.seek(OWNER_STARTS)
            file.write(owner)
            file.truncate()
        yield
    finally:
        with suppress(OSError):  # the directory was moved away, or somebody else writes to it
            if made and [file.name for file in path.parent.iterdir()] == [path.name]:
                path.unlink()  # while it is held: a process that waited for it finds that the file is gone
                path.parent.rmdir()
        lock.release()


def _locked(path: Path) -> BaseFileLock:
    """Acquire the kernel's lock, or the one that a file stands for."""
    lock: BaseFileLock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise RunInUse(
            f"{path.parent} is in use by {_owner_of(path)}",
            fix="wait for it, stop it with Ctrl-C, or choose another run directory",
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        lock = _soft_lock(path, error.strerror or str(error))
    return lock


def _soft_lock(path: Path, reason: str) -> BaseFileLock:
    marker = path.with_name(f"{path.name}{WITHOUT_LOCKS}")
    lock = SoftFileLock(marker, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise RunInUse(
            f"{path.parent} is in use by {_owner_of(path)}",
            fix=f"wait for it or stop it; if it died on another host, remove {marker}, which it could not",
        ) from None
    logger.warning(
        f"{path.parent} lies on a file system without locks ({reason}): {marker.name} keeps other processes out "
        "instead, and after a crash on another host has to be removed by hand"
    )
    return lock


def _owner_of(path: Path) -> str:
    """Return who holds a lock, in words, from the lock file.

    An owner writes its name just after it has the lock, so for an instant the file is empty, or names the process
    that held the lock before and is dead.
    """
    deadline = time.monotonic() + OWNER_PATIENCE_SECONDS
    while True:
        with path.open("rb", buffering=0) as file:
            file.seek(OWNER_STARTS)
            owner = file.read(MAX_OWNER_BYTES).decode(errors="replace").strip()
        if _may_be_alive(owner) or time.monotonic() > deadline:
            return _in_words(owner)
        time.sleep(0.01)


def _in_words(owner: str) -> str:
    try:
        facts = json.loads(owner)
        pid, host = int(facts["pid"]), str(facts["host"])
    except (ValueError, TypeError, KeyError):
        return "another process"
    return f"process {pid} on {host}" if host.isprintable() else "another process"


def _may_be_alive(owner: str) -> bool:
    try:
        facts = json.loads(owner)
        return facts["host"] != socket.gethostname() or is_running(int(facts["pid"]))
    except (ValueError, TypeError, KeyError, OverflowError):
        return False


# --- readers and retention -----------------------------------------------------------------------------------


@contextmanager
def kept_while_read(path: Path) -> Iterator[None]:
    """Let `unless_being_read` of other processes leave a file alone while this context is open.

    Where the file system has no locks, nothing keeps the file.

    Raises:
        FileNotFoundError: It was removed or renamed before this could begin.
    """
    with path.open("rb") as file:
        if not _flock(file.fileno(), exclusive=False) or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        yield


@contextmanager
def unless_being_read(path: Path) -> Iterator[bool]:
    """Yield whether nobody reads a file by `kept_while_read`, and let nobody begin to while this context is open.

    Where a file that is open can be neither renamed nor removed, it keeps itself: the context ends with the attempt.
    """
    if OPEN_FILES_STAY:
        with suppress(PermissionError):
            yield True
        return
    try:
        file = path.open("r+b")
    except OSError:
        yield True
        return
    with file:
        yield _flock(file.fileno(), exclusive=True)


def _flock(descriptor: int, *, exclusive: bool) -> bool:
    """Lock an open file without waiting; return False only where another process holds it."""
    if sys.platform != "win32":  # where what is open keeps itself
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True  # no locks here
    return True
