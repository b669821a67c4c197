"""Files behind an address: data sets of the Hugging Face Hub (hf://), object stores (s3://, gs://), web (https://).

They are read as they come, through fsspec, and never stored: of a table only the column with the text is fetched. A
read that fails is tried again from the byte that it had reached. A data set of the Hub is read at one commit, whatever
is pushed meanwhile, and the commit is part of the address that the manifest records.
"""

from __future__ import annotations

import io
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from resmol.errors import DataError, NetworkError, UsageError
from resmol.system.hub_download import reason, require_answer
from resmol.system.installation import install_hint
from resmol.system.untrusted_text import without_password

logger = logging.getLogger(__name__)

TRIES = 5
FIRST_WAIT_SECONDS = 1.0  # before the second try; it doubles
BLOCK_BYTES = 4 << 20
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "https", "https": "https"}
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://\S")
_HUB = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([^/]+))?(?:/(.*))?", re.ASCII)
_MISSING = {
    "RepositoryNotFoundError": "data set", "RevisionNotFoundError": "revision", "EntryNotFoundError": "file",
    "RemoteEntryNotFoundError": "file",
}  # fmt: skip
_SHORT_REVISIONS = {"~parquet": "refs/convert/parquet"}  # as the Hub's own addresses have it


def is_address(text: object) -> bool:
    """Return whether a text names a file by its address and not by a path."""
    return _ADDRESS.match(str(text)) is not None


@dataclass(frozen=True)
class RemoteFile:
    """A file that can be read at any position.

    Attributes:
        url: Its address; on the Hub with the commit.
        size: In bytes.
        identity: Changes when the content does: a hash or a version that the server states.
        path: Its name within ``filesystem``.
        filesystem: The file system of fsspec.
    """

    url: str
    size: int
    identity: str
    path: str
    filesystem: Any

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self.path.rpartition("/")[2]

    def __str__(self) -> str:
        return self.url

    def open(self) -> RemoteStream:
        """Return its content as a stream; nothing is asked before the first read."""
        return RemoteStream(self)


@dataclass(frozen=True)
class RemoteInput:
    """What an address stands for.

    Attributes:
        label: The address without passwords and signatures, on the Hub with the commit: for the manifest.
        files: The files, in the order of their names.
    """

    label: str
    files: tuple[RemoteFile, ...]


def find_remote_files(address: str, suffixes: Sequence[str]) -> RemoteInput:
    """Return the files of an address: one file, a pattern with ``*``, or a folder.

    Args:
        address: ``hf://datasets/OWNER/NAME[@REVISION][/PATH]``, or one of another file system of fsspec.
        suffixes: How the files of a folder end that are taken.

    Raises:
        UsageError: There is no such file system, or its package is not installed.
        NetworkError: The server does not answer, or refuses.
        DataError: Nothing is there.
    """
    filesystem, path, label = _hub(address) if address.startswith("hf://") else _other(address)
    try:
        found = _listed(filesystem, path, tuple(suffixes))
    except FileNotFoundError:
        found = {}
    except Exception as error:  # each file system has its own
        raise _refused(address, error) from error
    if not found:
        raise DataError(f"there is no text at {label}", fix="check the path; in quotes, * stands for any name")
    prefix = "hf://" if address.startswith("hf://") else f"{address.partition('://')[0]}://"
    files = [
        RemoteFile(_joined(prefix, name), int(facts["size"] or 0), _identity(facts), name, filesystem)
        for name, facts in sorted(found.items())
    ]
    return RemoteInput(label, tuple(files))


def _joined(prefix: str, name: str) -> str:
    """Return the address of a file that a file system lists by its path, or by its address."""
    return without_password(name.partition("?")[0]) if "://" in name else f"{prefix}{name}"


def _listed(filesystem: Any, path: str, suffixes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return name -> facts of the files at a path."""
    if "*" in path:
        found = filesystem.glob(path, detail=True)
    else:
        facts = filesystem.info(path)
        if facts["type"] == "file":
            return {path: facts}
        every = filesystem.find(path, detail=True)
        found = {name: one for name, one in every.items() if name.lower().endswith(suffixes)}
    return {name: facts for name, facts in found.items() if facts["type"] == "file"}


def _identity(facts: dict[str, Any]) -> str:
    lfs = facts.get("lfs")
    stated = (lfs or {}).get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    known = (facts.get(key) for key in ("blob_id", "ETag", "etag", "md5Hash", "version_id", "LastModified", "mtime"))
    return f"{stated or next((str(one) for one in known if one), '')} {facts['size']}"


def _hub(address: str) -> tuple[Any, str, str]:
    """Return the Hub's file system, the path at the commit that the revision means now, and the address of that."""
    from huggingface_hub import HfApi, HfFileSystem, constants

    parts = _HUB.fullmatch(address)
    if parts is None:
        raise UsageError(f"{address} is no data set of the Hub", fix="give hf://datasets/OWNER/NAME[@REVISION]/PATH")
    name, revision, path = parts[1], unquote(parts[2] or "main"), parts[3] or ""
    revision = _SHORT_REVISIONS.get(revision, revision)
    if constants.HF_HUB_OFFLINE:
        raise NetworkError(f"HF_HUB_OFFLINE is set, and {address} is on the Hub", fix="unset it, or name local files")
    require_answer(constants.ENDPOINT, constants.ENDPOINT, "check the connection, or HF_ENDPOINT; then run it again")
    try:
        commit = HfApi().repo_info(name, repo_type="dataset", revision=revision).sha
    except Exception as error:  # the client's errors come from several libraries, and differ between its versions
        raise _refused(address, error) from error
    pinned = f"datasets/{name}@{commit}" + (f"/{path}" if path else "")
    return HfFileSystem(skip_instance_cache=True), pinned, f"hf://{pinned}"


def _other(address: str) -> tuple[Any, str, str]:
    """Return the file system of an address, the path in it, and the address for messages."""
    import fsspec.core

    protocol = address.partition("://")[0]
    try:
        filesystem, path = fsspec.core.url_to_fs(address, skip_instance_cache=True)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        fix = install_hint(extra) if extra else f"install the package that fsspec needs for it: {reason(error)}"
        raise UsageError(f"{protocol}:// needs a package that is not installed", fix=fix) from error
    except ValueError as error:
        raise UsageError(
            f"{protocol}:// is no file system: {reason(error)}", fix="give a path, or hf://datasets/…"
        ) from error
    return filesystem, str(path), without_password(address.partition("?")[0])


def _refused(address: str, error: Exception) -> DataError:
    """Return the error for what a server refuses, with what to do about it."""
    shown = without_password(address.partition("?")[0])
    kinds = {type(error).__name__, type(error.__cause__).__name__}  # a file system may wrap what the client raises
    if "GatedRepoError" in kinds:
        page = address.removeprefix("hf://").partition("@")[0]
        return NetworkError(
            f"{shown} is gated: its owner wants to know who reads it",
            fix=f"accept the terms on https://huggingface.co/{page} in the browser, then `hf auth login`",
        )
    missing = next((what for kind, what in _MISSING.items() if kind in kinds), None)
    if missing is not None:
        return NetworkError(
            f"{shown}: the Hub has no such {missing}, or not for you",
            fix="check its name; a private one needs `hf auth login`",
        )
    return NetworkError(
        f"{shown} cannot be read ({reason(error)})", fix="check the address and the connection, then run it again"
    )


class RemoteStream(io.RawIOBase):
    """The content of a `RemoteFile`, fetched in blocks; a read that fails is tried again."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._position = 0
        self._handle: Any = None

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position of the next read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position; nothing is fetched."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def close(self) -> None:
        """Close the connection."""
        self._drop()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` from the current position on, to the end of the file at most.

        Raises:
            NetworkError: The server refuses, or each of `TRIES` tries failed.
        """
        wanted, filled, tries = min(len(buffer), self._file.size - self._position), 0, 0
        while filled < wanted:
            try:
                data = self._fetch(min(wanted - filled, BLOCK_BYTES))
            except Exception as error:  # each file system has its own
                tries += 1
                self._drop()
                self._wait_or_give_up(tries, error)
                continue
            buffer[filled : filled + len(data)] = data
            filled += len(data)
            self._position += len(data)
            tries = 0
        return max(0, filled)

    def _fetch(self, size: int) -> bytes:
        if self._handle is None:
            self._handle = self._file.filesystem.open(self._file.path, "rb", block_size=BLOCK_BYTES)
        self._handle.seek(self._position)
        data = bytes(self._handle.read(size))
        if not data:
            raise EOFError(f"it ended after {self._position:,} of {self._file.size:,} bytes")
        return data

    def _wait_or_give_up(self, tries: int, error: Exception) -> None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, FileNotFoundError | PermissionError) or status in (401, 403, 404):
            raise _refused(self._file.url, error) from error
        if tries >= TRIES:
            raise NetworkError(
                f"{self._file.url}: reading failed {tries} times at byte {self._position:,} ({reason(error)})",
                fix="check the connection, then run the same command again",
            ) from error
        seconds = FIRST_WAIT_SECONDS * 2.0 ** (tries - 1)
        logger.info(f"data: {self._file.name}: {reason(error)}; trying again in {seconds:.0f} s")
        time.sleep(seconds)

    def _drop(self) -> None:
        """Close the connection, and forget what was fetched through it."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()
