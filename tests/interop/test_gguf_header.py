"""The GGUF header reader agrees with the gguf package on sound files, and ends on every other file."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from profiles import UNTIMED, examples

from resmol.errors import CheckpointError, DataError, ResmolError
from resmol.interop.gguf_header import MAX_HEADER_BYTES, is_gguf, read_gguf_header, readable_types


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_bytes(fields: list[bytes], tensors: list[bytes], data: int = 0, *, version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields)) + b"".join(fields + tensors)
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the gguf package with every kind of metadata and several types of tensors."""
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.u32", 7)
    writer.add_int64("a.i64", -(2**40))
    writer.add_float32("a.f32", 1e-5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "é\n")
    writer.add_array("a.words", ["x", "", "ü"])
    writer.add_array("a.numbers", [1, -2, 3])
    draw = np.random.default_rng(0)
    for kind in (
        gguf.GGMLQuantizationType.Q8_0,
        gguf.GGMLQuantizationType.Q4_1,
        gguf.GGMLQuantizationType.BF16,
    ):
        values = gguf.quants.quantize(draw.standard_normal((3, 64), dtype=np.float32), kind)
        writer.add_tensor(f"t.{kind.name}", values, raw_dtype=kind)
    writer.add_tensor("t.F16", np.ones((2, 5), np.float16))
    writer.add_tensor("t.F32", np.ones(7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_agrees_with_the_gguf_package(written: Path) -> None:
    ours, theirs = read_gguf_header(written), gguf.GGUFReader(written)
    for key, value in ours.metadata.items():
        assert value == theirs.fields[key].contents(), key
    assert len(ours.metadata) == len([key for key in theirs.fields if not key.startswith("GGUF.")])
    assert set(ours.tensors) == {item.name for item in theirs.tensors}
    for item in theirs.tensors:
        mine = ours.tensors[item.name]
        assert (mine.kind, mine.type_number) == (item.tensor_type.name, item.tensor_type.value)
        assert mine.shape == tuple(item.shape.tolist())[::-1]
        assert (mine.start, mine.end) == (item.data_offset, item.data_offset + item.n_bytes)


@pytest.mark.parametrize("kind", gguf.GGMLQuantizationType)
def test_every_type_that_the_package_dequantizes_is_read(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    items, size = gguf.GGML_QUANT_SIZES[kind]
    (tmp_path / "x.gguf").write_bytes(file_bytes([], [tensor("a", (items,), kind.value, 0)], size))
    try:
        gguf.quants.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
    except NotImplementedError:
        assert kind.value not in readable_types()
        with pytest.raises(CheckpointError, match=rf"ggml type {kind.value} \({kind.name}\)") as caught:
            read_gguf_header(tmp_path / "x.gguf")
        assert "not a sound" not in caught.value.what  # the file is no worse for a type that is not known here
    else:
        assert read_gguf_header(tmp_path / "x.gguf").tensors["a"].kind == kind.name
        assert readable_types()[kind.value] == (kind.name, items, size)


def test_arrays_of_arrays_are_read(tmp_path: Path) -> None:
    inner = struct.pack("<IQ2i", 5, 2, -1, 7)
    (tmp_path / "x.gguf").write_bytes(file_bytes([field("a", 9, struct.pack("<IQ", 9, 2) + inner * 2)], []))
    assert read_gguf_header(tmp_path / "x.gguf").metadata == {"a": [[-1, 7], [-1, 7]]}


def test_a_version_that_is_not_read_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(file_bytes([], [], version=1))
    with pytest.raises(CheckpointError, match="its version is 1") as caught:
        read_gguf_header(tmp_path / "x.gguf")
    assert "not a sound" not in caught.value.what
    assert "llama.cpp" in caught.value.fix


ENDLESS = field("a", 9, struct.pack("<IQ", 0, 2**60))  # an array of 2^60 bytes; the gguf package never returns


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "does not begin with GGUF"),
        (b"GGUF", "it claims 4 bytes"),
        (file_bytes([], [], version=1), "version is 1"),
        (file_bytes([], [], version=3 << 24), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "claims"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "a string claims"),
        (file_bytes([ENDLESS], []), "an array claims"),
        (file_bytes([field("a", 9, struct.pack("<IQ", 8, 2**60))], []), "an array claims"),
        (file_bytes([field("a", 9, struct.pack("<IQ", 9, 1) * 4)], []), "type 9 is not supported"),
        (file_bytes([field("a", 9, struct.pack("<IQ", 9, 2**60))], []), "an array claims"),
        (file_bytes([field("a", 13, b"")], []), "type 13 is not supported"),
        (file_bytes([field("a", 8, struct.pack("<Q", 1) + b"\xff")], []), "utf-8"),
        (file_bytes([field("a", 7, b"\1")] * 2, []), "'a' occurs twice"),
        (file_bytes([field("general.alignment", 4, struct.pack("<I", 0))], []), "power of two"),
        (file_bytes([field("general.alignment", 4, struct.pack("<I", 48))], []), "power of two"),
        (file_bytes([field("general.alignment", 8, text("32"))], []), "power of two"),
        (file_bytes([], [tensor("t", (8,), 0, 0)] * 2, 64), "occurs twice"),
        (file_bytes([], [tensor("t", (), 0, 0)], 64), "0 dimensions"),
        (file_bytes([], [tensor("t", (1,) * 5, 0, 0)], 64), "5 dimensions"),
        (file_bytes([], [tensor("t", (8,), 99, 0)], 64), "ggml type 99"),
        (file_bytes([], [tensor("t", (8,), 8, 0)], 64), "do not fill blocks of 32"),
        (file_bytes([], [tensor("t", (8, 0), 0, 0)], 64), "do not fill"),
        (file_bytes([], [tensor("t", (8,), 0, 4)], 64), "misaligned"),
        (file_bytes([], [tensor("t", (8,), 0, 0), tensor("u", (8,), 0, 0)], 64), "overlaps"),
        (file_bytes([], [tensor("t", (8,), 0, 0), tensor("u", (8,), 0, 32)], 63), "the file has"),
        (file_bytes([], [tensor("t", (2**62, 4), 0, 0)], 64), "the file has"),  # 2^66 bytes are 0 modulo 2^64
    ],
)  # fmt: skip
def test_every_broken_rule_is_named(content: bytes, rule: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    started = time.thread_time()
    with pytest.raises(CheckpointError, match=r"x\.gguf") as caught:
        read_gguf_header(tmp_path / "x.gguf")
    assert rule in caught.value.what
    assert time.thread_time() - started < 5


def test_a_large_file_of_nonsense_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "x.gguf").open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**31))
        file.truncate(2**32)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="a string claims"):
        read_gguf_header(tmp_path / "x.gguf")
    assert tracemalloc.get_traced_memory()[1] < 2 * MAX_HEADER_BYTES
    tracemalloc.stop()


@settings(examples(300), suppress_health_check=[*UNTIMED, HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_give_a_clear_error_or_a_header(data: st.DataObject, written: Path, tmp_path: Path) -> None:
    content = bytearray(written.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 900))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    (tmp_path / "x.gguf").write_bytes(content[:cut])
    try:
        header = read_gguf_header(tmp_path / "x.gguf")
    except ResmolError:
        return
    assert all(item.end <= cut for item in header.tensors.values())


def test_what_is_no_file_is_an_error(written: Path, tmp_path: Path) -> None:
    assert is_gguf(written)
    for read in (is_gguf, read_gguf_header):
        for path in (tmp_path, tmp_path / "missing"):
            with pytest.raises(DataError, match="cannot read"):
                read(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_gguf_header(tmp_path / "x.gguf")
