"""Reading an export back where its file system cannot map files, as other libraries do."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from resmol.interop.export.parity import where_it_can_be_mapped


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_what_cannot_be_mapped_is_read_back_from_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    with where_it_can_be_mapped(tmp_path) as readable:
        assert readable == tmp_path

    def no_mapping(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mmap, "mmap", no_mapping)
    with where_it_can_be_mapped(tmp_path) as readable:
        assert readable != tmp_path
        assert {file.name: file.read_bytes() for file in readable.iterdir()} == {name: b"weights", "config.json": b"{}"}
    assert not readable.exists()
