"""Read the header of a GGUF file strictly: metadata and tensor table, no tensor data, no PyTorch.

The reader of the `gguf` package is made for trusted files: 60 bytes that claim an array of 2^60 items keep it busy
for ever. Here every count and length is compared with the bytes that are left before it is used.
Source of the layout: the GGUF specification, version 3 (version 2 has the same layout).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from resmol.errors import CheckpointError, DataError
from resmol.system.wording import counted

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 16_000_000  # SmolLM2's, with its vocabulary and merges, has 1.8 MB
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 512
MAX_DEPTH = 4  # of arrays in arrays

_SCALARS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor table.

    Attributes:
        kind: Name of the ggml type, such as ``Q4_1``.
        type_number: Its number in ggml.
        shape: Rows first, as in PyTorch (the file has it the other way round).
        start: Where its data begins in the file.
        end: Where its data ends in the file.
        part: Which of the header's files holds it.
    """

    kind: str
    type_number: int
    shape: tuple[int, ...]
    start: int
    end: int
    part: int = 0


@dataclass(frozen=True)
class GGUFHeader:
    """A header that keeps the rules.

    Attributes:
        metadata: Scalars, strings, lists of them and lists of lists, by key.
        tensors: The table of tensors, by GGUF's name.
        files: The file; the parts of a split one in their order (`gguf_parts`).
    """

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    files: tuple[Path, ...] = ()


class _BrokenRuleError(ValueError):
    """A broken rule, in words; turned into a `CheckpointError` that names the file."""


class _UnsupportedError(ValueError):
    """What a sound file may hold and nothing here reads: what it is, and what to do."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix


def is_gguf(path: Path) -> bool:
    """Return whether a file begins like a GGUF file (`DataError` when it cannot be read)."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", fix="check the path") from None


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read metadata and tensor table of one file.

    Raises:
        CheckpointError: It is not a GGUF file, it breaks a rule of the format, or no reader of its types is installed.
        DataError: It is not there, or cannot be read.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe would block until somebody writes to it
            raise _BrokenRuleError("it is not a regular file")
        with path.open("rb") as file:
            file_size = path.stat().st_size
            cursor = _Cursor(file.read(min(file_size, MAX_HEADER_BYTES)))
        return replace(_parse(cursor, file_size), files=(path,))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", fix="check the path") from None
    except _UnsupportedError as error:
        raise CheckpointError(f"{path}: {error}", fix=f"{error.fix}; the file may be sound") from None
    except ValueError as error:  # our own rules, and text that is not UTF-8
        raise CheckpointError(
            f"{path} is not a sound GGUF file: {str(error)[:300]}",
            fix="fetch or export the file again; nothing of it was loaded",
        ) from None


class _Cursor:
    """Reads forward through bytes that are not trusted."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def bytes(self, count: int) -> bytes:
        """Return the next ``count`` bytes."""
        if count > len(self.data) - self.at:
            raise _BrokenRuleError(f"it claims {counted(count, 'byte')} at byte {self.at}, where the header ends")
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, form: str) -> Any:
        """Return the next number; ``form`` is its `struct` code."""
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def text(self, limit: int = MAX_HEADER_BYTES) -> str:
        """Return the next string: its length as 64 bits, then UTF-8."""
        length = self.scalar("<Q")
        if length > limit:
            raise _BrokenRuleError(f"a string claims {counted(length, 'byte')} at byte {self.at}")
        return self.bytes(length).decode("utf-8")

    def value(self) -> Any:
        """Return the next metadata value: its type, then itself."""
        kind = self.scalar("<I")
        if kind == _ARRAY:
            return self._array()
        return self.text() if kind == _STRING else self.scalar(_scalar_form(kind))

    def _array(self, depth: int = 1) -> list[Any]:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind == _ARRAY and depth < MAX_DEPTH:
            self._require_items(count, 12)  # the type and the count of each
            return [self._array(depth + 1) for _ in range(count)]
        if kind == _STRING:
            self._require_items(count, 8)
            return [self.text() for _ in range(count)]
        form = _scalar_form(kind)
        self._require_items(count, struct.calcsize(form))
        return list(struct.unpack(f"<{count}{form[1]}", self.bytes(count * struct.calcsize(form))))

    def _require_items(self, count: int, item_bytes: int) -> None:
        if count > (len(self.data) - self.at) // item_bytes:
            raise _BrokenRuleError(f"an array claims {counted(count, 'item')} at byte {self.at}, where the header ends")


def _scalar_form(kind: int) -> str:
    if kind not in _SCALARS:
        raise _BrokenRuleError(f"metadata type {kind} is not supported")
    return _SCALARS[kind]


def _parse(cursor: _Cursor, file_size: int) -> GGUFHeader:
    if cursor.data[: len(MAGIC)] != MAGIC:
        raise _BrokenRuleError("it does not begin with GGUF")
    cursor.at = len(MAGIC)
    version, tensor_count, field_count = (cursor.scalar(form) for form in ("<I", "<Q", "<Q"))
    if version not in (2, 3):
        raise _UnsupportedError(
            f"its version is {version}; 2 and 3 are supported (big-endian files are not)",
            fix="convert the model again with llama.cpp of today, for little-endian machines",
        )
    metadata: dict[str, Any] = {}
    for _ in range(field_count):  # a false count ends at the end of the data, not in memory
        key = cursor.text(MAX_NAME_BYTES)
        if key in metadata:
            raise _BrokenRuleError(f"the key {key!r} occurs twice")
        metadata[key] = cursor.value()
    table = [_table_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 65536 or alignment & (alignment - 1):
        raise _BrokenRuleError(f"general.alignment is {alignment!r}, not a power of two from 8 to 65536")
    data_start = -(-cursor.at // alignment) * alignment
    return GGUFHeader(metadata, _place(table, data_start, alignment, file_size))


def _table_entry(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """Return name, type number, shape (rows first) and offset into the data."""
    name, dimensions = cursor.text(MAX_NAME_BYTES), cursor.scalar("<I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise _BrokenRuleError(f"tensor {name!r} has {counted(dimensions, 'dimension')}")
    shape = tuple(cursor.scalar("<Q") for _ in range(dimensions))[::-1]
    return name, cursor.scalar("<I"), shape, cursor.scalar("<Q")


def _place(
    table: list[tuple[str, int, tuple[int, ...], int]], data_start: int, alignment: int, file_size: int
) -> dict[str, GGUFTensor]:
    """Turn offsets into positions in the file; refuse overlaps, and data beyond the end."""
    tensors: dict[str, GGUFTensor] = {}
    end = data_start
    for name, number, shape, offset in sorted(table, key=lambda entry: entry[3]):
        if name in tensors:
            raise _BrokenRuleError(f"tensor {name!r} occurs twice")
        kind, block_items, block_bytes = _known_type(name, number)
        if not all(shape) or shape[-1] % block_items:
            raise _BrokenRuleError(f"tensor {name!r}: rows of {shape[-1]} do not fill blocks of {block_items} ({kind})")
        start = data_start + offset
        if offset % alignment or start < end:
            raise _BrokenRuleError(f"tensor {name!r} is misaligned, or overlaps the one before")
        end = start + math.prod(shape) // block_items * block_bytes
        if end > file_size:
            raise _BrokenRuleError(f"tensor {name!r} ends at byte {end}; the file has {file_size}")
        tensors[name] = GGUFTensor(kind, number, shape, start, end)
    return tensors


def _known_type(name: str, number: int) -> tuple[str, int, int]:
    """Return the name of a tensor's type, the items in a block, and the bytes of a block."""
    if (found := readable_types().get(number)) is not None:
        return found
    from gguf import GGMLQuantizationType

    named = {kind.value: f" ({kind.name})" for kind in GGMLQuantizationType}.get(number, "")
    raise _UnsupportedError(
        f"tensor {name!r} has ggml type {number}{named}, which the installed gguf package cannot dequantize",
        fix="name a file of another type, such as Q8_0, Q4_K_M or F16",
    )


@lru_cache
def readable_types() -> dict[int, tuple[str, int, int]]:
    """Return the types that the gguf package dequantizes: ggml number -> name, items in a block, bytes of a block."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, quants

    found = {}
    for kind, (items, size) in GGML_QUANT_SIZES.items():
        try:
            quants.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
        except NotImplementedError:  # integers, and types of intermediate results
            continue
        found[kind.value] = (kind.name, items, size)
    return found
