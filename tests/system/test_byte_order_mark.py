"""Byte order marks of every kind, and files of Windows editors in the places that read text."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from resmol.config.load import load_config
from resmol.data.tokenizer import load_tokenizer
from resmol.system.byte_order_mark import decode_text, marked_encoding
from resmol.verify.third_party.name_file import read_name_map

TEXT = "naïve 漢字 😀\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_mark_names_its_encoding_and_is_dropped(encoding: str) -> None:
    data = ("\ufeff" + TEXT).encode(encoding)
    assert marked_encoding(data) == encoding
    assert decode_text(data) == TEXT


def test_without_a_mark_it_is_utf_8() -> None:
    assert marked_encoding(TEXT.encode()) is None
    assert decode_text(TEXT.encode()) == TEXT
    with pytest.raises(UnicodeDecodeError):
        decode_text(b"caf\xe9")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le"])
def test_a_configuration_and_a_name_map_with_a_mark_are_read(encoding: str, tmp_path: Path) -> None:
    config, names = tmp_path / "own.toml", tmp_path / "names.json"
    config.write_bytes('\ufeffbase = "nano"\r\n[optimizer]\r\nlr = 0.5\r\n'.encode(encoding))
    names.write_bytes('\ufeff{"a": "b"}\r\n'.encode(encoding))
    assert load_config(config).optimizer.lr == 0.5
    assert read_name_map(names) == {"a": "b"}


def test_a_tokenizer_with_a_mark_is_the_tokenizer_without_it(tiny_tokenizer_file: Path, tmp_path: Path) -> None:
    content = tiny_tokenizer_file.read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + content)
    plain = load_tokenizer(tiny_tokenizer_file, sha256=hashlib.sha256(content).hexdigest(), cache=tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json", sha256=plain.sha256, cache=tmp_path).data == content
