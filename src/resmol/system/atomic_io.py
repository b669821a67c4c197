"""Durable writes: a file or a directory is there whole, or not at all.

The commit protocol for a directory (power loss at any instant leaves the old or the new state, never a mixture):

1. write every file into ``tmp-<name>-<random>/``, flush and fsync each;
2. write ``manifest.json`` last (its presence is the commit), fsync it;
3. fsync the temporary directory, so that its entries are on disk;
4. rename it to its final name;
5. fsync the parent, so that the rename is on disk.

An fsync that fails may have dropped the dirty pages and may report success the next time, so nothing is ever
retried on the same file: the temporary directory is abandoned and the caller starts a fresh one.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from resmol.errors import DiskFull

if sys.platform == "darwin":
    import fcntl

logger = logging.getLogger(__name__)

TEMPORARY_PREFIX = "tmp-"
OPEN_FILES_STAY = sys.platform == "win32"  # there, a file that is open can be neither renamed nor removed
RENAME_PATIENCE_SECONDS = 2.0  # with a program that looks into every new file there, such as a virus scanner
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file grew over what this file system, or the limit of `ulimit -f`, allows",
}
# How systems answer that have no such operation for a directory: to sync it, or (the last two) to open it. Not EIO.
_NO_DIRECTORY_SYNC = {
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EISDIR,
}  # fmt: skip
_NO_FULL_SYNC = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY}  # network file systems, on macOS


def fsync_file(descriptor: int) -> None:
    """Flush an open file to the disk (``OSError`` when the disk fails)."""
    if sys.platform == "darwin":  # whose fsync(2) leaves it in the drive's own cache
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in _NO_FULL_SYNC:
                raise
        else:
            return
    os.fsync(descriptor)


def fsync_path(path: Path) -> None:
    """Flush one file or directory to the disk (``OSError`` when the disk fails).

    A file system that cannot flush directories at all (CIFS, some FUSE mounts) is no failure: that is logged once, and
    its names become durable when it likes. On Windows that is so everywhere, and not logged.
    """
    if sys.platform == "win32" and path.is_dir():
        return
    try:
        descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
        try:
            fsync_file(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC or not path.is_dir():
            raise
        _log_no_directory_sync(path.stat().st_dev, error.strerror)


@functools.cache
def _log_no_directory_sync(_device: int, reason: str) -> None:
    """Log it once for each file system."""
    logger.warning(
        f"this file system cannot sync directories ({reason}): a crash of the process loses nothing, but a power cut "
        "may take back the newest names, and a checkpoint with them"
    )


def make_directory(path: Path) -> None:
    """Create a directory, and those above it, so that a power cut does not take back their names (it may exist)."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_path(folder.parent)


def write_durable(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` so that a crash leaves the old content or the new one.

    Raises:
        DiskFull: No room; the old content is untouched.
        OSError: Any other failure of the disk; the old content is untouched.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:12]}")
    with full_disk_is_an_error(path):
        try:
            _write_and_sync(temporary, data)
            # The fault tests watch `os`, one module for every effect.
            _patiently(lambda: os.replace(temporary, path))  # noqa: PTH105
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    fsync_path(path.parent)


def _write_and_sync(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        fsync_file(file.fileno())


def commit_directory(final: Path, write_files: Callable[[Path], None], manifest: Callable[[Path], bytes]) -> None:
    """Create the directory ``final`` with the protocol above.

    Args:
        final: The directory to create; it must not exist yet.
        write_files: Writes the payload files into the directory it is given (it need not fsync).
        manifest: Called after the files are durable; returns the bytes of ``manifest.json``.

    Raises:
        DiskFull: No room; the temporary directory was removed.
        OSError: Any other failure of the disk; the temporary directory was removed where possible.
    """
    commit_staged(stage_directory(final, write_files), final, manifest)


def stage_directory(final: Path, write_files: Callable[[Path], None]) -> Path:
    """Do the part that does not wait for the disk: write the files into a temporary directory beside ``final``.

    Returns:
        The temporary directory, for `commit_staged`. Nothing in it is durable yet. Raises what that raises.
    """
    temporary = final.with_name(f"{TEMPORARY_PREFIX}{final.name}-{uuid.uuid4().hex[:12]}")
    with full_disk_is_an_error(final), abandoned_on_error(temporary):
        os.mkdir(temporary)  # noqa: PTH102
        write_files(temporary)
    return temporary


def commit_staged(temporary: Path, final: Path, manifest: Callable[[Path], bytes]) -> None:
    """Do the rest of `commit_directory`: make the files of `stage_directory` durable, and rename the directory."""
    with full_disk_is_an_error(final), abandoned_on_error(temporary):
        for file in sorted(temporary.iterdir()):
            fsync_path(file)
        _write_and_sync(temporary / "manifest.json", manifest(temporary))
        fsync_path(temporary)
        _patiently(lambda: os.rename(temporary, final))  # noqa: PTH104
    fsync_path(final.parent)


def _patiently(rename: Callable[[], None]) -> None:
    """Rename; where a file that is open stays, wait a moment for whoever reads it (`PermissionError` after that)."""
    deadline = time.monotonic() + RENAME_PATIENCE_SECONDS
    while True:
        try:
            return rename()
        except PermissionError:
            if not OPEN_FILES_STAY or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


@contextmanager
def abandoned_on_error(temporary: Path) -> Iterator[None]:
    """Remove a temporary directory where this context fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_directory(path: Path) -> None:
    """Remove a committed directory so that a crash never leaves a half that looks whole.

    It is first renamed, atomically; a crash leaves a ``tmp-`` directory behind, which every reader ignores and
    `remove_leftovers` removes.
    """
    expired = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:12]}")
    _patiently(lambda: os.rename(path, expired))  # noqa: PTH104
    fsync_path(path.parent)
    _remove_tree(expired)


def _remove_tree(path: Path) -> None:
    """Remove a directory that lost its name; what cannot go yet is logged and left for `remove_leftovers`.

    On NFS a file that a reader has open stays as ``.nfs...`` until it is closed, and a file manager may add its own.
    """
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        logger.warning(f"{path} could not be removed whole; the next start tries again")


def remove_leftovers(parent: Path) -> list[str]:
    """Remove the ``tmp-`` entries that a crash left in ``parent``; call it only while holding the run's lock.

    Returns:
        The names that were removed.
    """
    names = sorted(entry.name for entry in parent.glob(f"{TEMPORARY_PREFIX}*"))
    for name in names:
        leftover = parent / name
        if leftover.is_dir() and not leftover.is_symlink():
            _remove_tree(leftover)
        else:
            leftover.unlink()
    return names


@contextmanager
def full_disk_is_an_error(path: Path) -> Iterator[None]:
    """Turn ENOSPC, EDQUOT and EFBIG below this context into `DiskFull`, which names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            error.filename = error.filename or str(path)  # a failed write or fsync does not know its file's name
            raise
        raise DiskFull(
            f"{_NO_ROOM[error.errno]}: {path} was not written; earlier files are untouched",
            fix="free some space (or move the run to another disk) and run the same command again",
        ) from error


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``source`` appear as ``target``: as a symbolic link, or a copy where the user may make none (Windows)."""
    try:
        target.symlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
