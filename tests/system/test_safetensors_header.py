"""The header reader accepts what the library writes, and refuses all else before it costs anything."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from safetensors import safe_open
from safetensors.torch import save_file

from resmol.errors import CheckpointError, DataError, ResmolError
from resmol.system.safetensors_header import MAX_HEADER_BYTES, new_header, parse_header, read_header

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWO = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


def file_bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a file with this header, which may be JSON text or a value."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def parse(content: bytes) -> Any:
    return parse_header(content, len(content), "file.safetensors")


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_new_header_is_that_of_the_library(tmp_path: Path, name: str) -> None:
    """Names in another order than the tensors', one that JSON escapes, a scalar and an empty tensor."""
    dtype = getattr(torch, name)
    tensors = {name: torch.ones(shape, dtype=dtype) for name, shape in
               (("b.weight", (3, 2)), ("a.10", (0, 4)), ('a.9"\\\n', ()), ("ü", (5,)))}  # fmt: skip
    save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    header, head = new_header({"float32": "F32", "bfloat16": "BF16"}[name], shapes, {"format": "pt"})
    content = (tmp_path / "file").read_bytes()
    assert content.startswith(head)
    assert header.file_bytes == len(content)
    assert header == read_header(tmp_path / "file")


def test_agrees_with_the_library(tmp_path: Path) -> None:
    tensors = {
        "b": torch.ones(3, 5, dtype=torch.bfloat16),
        "a": torch.ones(2, dtype=torch.float64),
        "scalar": torch.tensor(7, dtype=torch.int16),
        "empty": torch.ones(0, 4),
        "flag": torch.tensor([True]),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "é": "ü"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt", "é": "ü"}
    content = (tmp_path / "x.safetensors").read_bytes()[header.header_bytes :]
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert set(header.tensors) == set(file.keys())
        for name, info in header.tensors.items():
            assert list(info.shape) == file.get_slice(name).get_shape()
            assert info.dtype == file.get_slice(name).get_dtype()
            raw = file.get_tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert content[info.start : info.end] == raw


def test_a_header_that_begins_like_a_pickle_is_still_a_header() -> None:
    text = json.dumps({"a": ONE}).encode().ljust(1152)  # 1152 is 0x0480: the bytes of pickle protocol 4
    content = file_bytes(text, bytes(8))
    assert content[:2] == b"\x80\x04"
    assert parse(content).tensors["a"].shape == (2,)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "0 bytes"),
        (b"\x02\x00\x00", "3 bytes"),
        (file_bytes({}, length=2**63), f"claims a header of {2**63:,}"),
        (file_bytes({}, length=2**64 - 1), "claims a header"),
        (file_bytes(b" " * 50), "begin with '{'"),
        (file_bytes(b"{}", length=3), "claims a header of 3"),
        (file_bytes(b'{"a": }'), "Expecting value"),
        (file_bytes(b'{"a": "\xff"}'), "utf-8"),
        (file_bytes(b'{"a": NaN}'), "NaN"),
        (file_bytes(b'{"a":' * 50_000), "nested too deeply"),
        (file_bytes({"a": [1]}), "exactly dtype, shape and data_offsets"),
        (file_bytes({"a": ONE | {"extra": 1}}, bytes(8)), "exactly dtype"),
        (file_bytes({"a": ONE | {"dtype": "F31"}}, bytes(8)), "unknown dtype 'F31'"),
        (file_bytes({"a": ONE | {"dtype": ["F32"]}}, bytes(8)), "unknown dtype"),
        (file_bytes({"a": ONE | {"shape": [-2]}}, bytes(8)), "whole numbers"),
        (file_bytes({"a": ONE | {"shape": [2.0]}}, bytes(8)), "whole numbers"),
        (file_bytes({"a": ONE | {"shape": [True, 2]}}, bytes(8)), "whole numbers"),
        (file_bytes({"a": ONE | {"shape": [1] * 9 + [2]}}, bytes(8)), "whole numbers"),
        (file_bytes({"a": ONE | {"shape": [2**62 + 2]}}, bytes(8)), "needs"),  # 2^64 + 8 bytes
        (file_bytes({"a": ONE | {"shape": [2**63]}}, bytes(8)), "whole numbers"),
        (file_bytes({"a": ONE | {"shape": [3]}}, bytes(8)), "needs 12 bytes and has 8"),
        (file_bytes({"a": ONE | {"data_offsets": [8, 0]}}, bytes(8)), "ascending"),
        (file_bytes({"a": ONE | {"data_offsets": [0, 8, 8]}}, bytes(8)), "ascending"),
        (file_bytes({"a": ONE, "b": ONE}, bytes(8)), "overlaps"),
        (file_bytes({"a": ONE, "b": TWO | {"data_offsets": [12, 20]}}, bytes(20)), "hole"),
        (file_bytes({"b": TWO}, bytes(16)), "hole"),
        (file_bytes({"a": ONE}, bytes(7)), "truncated"),
        (file_bytes({"a": ONE}, bytes(9)), "has no name"),
        (file_bytes({}, bytes(1)), "has no name"),
        (file_bytes({"__metadata__": {"a": 1}}), "strings"),
        (file_bytes({"__metadata__": ["a"]}), "strings"),
        (file_bytes(b'{"a": 1, "b": {}, "a": 2}'), "'a' twice"),
        (file_bytes(b'{"a": {"dtype":"F32","dtype":"F32","shape":[2]}}'), "'dtype' twice"),
        (file_bytes(b'{"a": {"dtype":"F32","shape":[%b]}}' % (b"9" * 5000)), "digits"),
        (file_bytes({"\udc00" + "x" * 500: [1]}), "exactly dtype"),  # a name that cannot be printed as it is
        (b"GGUF" + bytes(30), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
    ],
)  # fmt: skip
def test_every_broken_rule_is_named(content: bytes, rule: str) -> None:
    with pytest.raises(CheckpointError, match=r"file\.safetensors") as caught:
        parse(content)
    assert rule in caught.value.what
    assert len(caught.value.what) < 500
    caught.value.what.encode()  # it can be printed


def test_metadata_and_several_tensors_are_read() -> None:
    header = parse(file_bytes({"b": TWO, "__metadata__": {"k": "v"}, "a": ONE}, bytes(16)))
    assert list(header.tensors) == ["a", "b"]
    assert header.metadata == {"k": "v"}


def test_every_cut_and_every_added_byte_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for size in range(len(whole)):
        with pytest.raises(CheckpointError):
            parse(whole[:size])
    with pytest.raises(CheckpointError):
        parse(whole + b"\0")
    parse(whole)


@examples(300)
@given(st.data())
def test_changed_bytes_give_an_error_or_a_header_that_keeps_the_rules(data: st.DataObject) -> None:
    content = bytearray(file_bytes({"a": ONE, "b": TWO, "__metadata__": {"k": "v"}}, bytes(16)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 17))] = data.draw(st.integers(0, 255))
    try:
        header = parse(bytes(content))
    except ResmolError:
        return
    assert sum(info.end - info.start for info in header.tensors.values()) == 16


@pytest.mark.parametrize("size", [1_000, 100_000_000])
def test_a_huge_claim_costs_no_memory(tmp_path: Path, size: int) -> None:
    """A claim beyond the file, and 100 MB of real JSON: both are refused by the length alone."""
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 99_000_000) + b'{"a":')
        file.truncate(size)
    tracemalloc.start()
    started = time.thread_time()
    with pytest.raises(CheckpointError, match="99,000,000"):
        read_header(path)
    assert time.thread_time() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_the_largest_header_that_is_read_costs_little_memory() -> None:
    text = b'{"a":[' + b"[]," * ((MAX_HEADER_BYTES - 20) // 3) + b"1]}"
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="exactly dtype"):
        parse(file_bytes(text))
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


class Gadget:
    """What a malicious pickle does: it runs a call of its author's choice when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_is_called_one_and_never_read(tmp_path: Path, protocol: int, name: str) -> None:
    canary = tmp_path / "canary"
    (tmp_path / name).write_bytes(pickle.dumps(Gadget(canary), protocol=protocol))
    with pytest.raises(CheckpointError, match=r"pickle.*never unpickles"):
        read_header(tmp_path / name)
    assert not canary.exists()


def test_an_archive_of_torch_save_is_called_a_pickle(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "new.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    assert zipfile.is_zipfile(tmp_path / "new.safetensors")
    for name in ("new", "old"):
        with pytest.raises(CheckpointError, match=r"pickle.*never unpickles"):
            read_header(tmp_path / f"{name}.safetensors")


def test_what_is_no_file_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match="cannot read"):
            read_header(path)
