"""Read the header of a safetensors file strictly, and write one: no tensor data, no code, no PyTorch.

A safetensors file is 8 bytes (little-endian length N), N bytes of JSON (name -> dtype, shape, data_offsets)
and the data. Common readers accept files that break the format's own rules, such as duplicate keys. Here each
rule is checked before a byte of the data is used, and a violation is a `CheckpointError`.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resmol.errors import CheckpointError, DataError
from resmol.system.untrusted_text import parse_json, quoted
from resmol.system.wording import counted

# The format allows 100 MB, which as JSON becomes gigabytes of objects; a header of SmolLM2-135M has 30 kB.
MAX_HEADER_BYTES = 1_000_000
MAX_DIMENSIONS = 8
LENGTH_BYTES = 8

DTYPE_BYTES = {
    name: size
    for size, names in {
        1: "BOOL U8 I8 F8_E4M3 F8_E5M2",
        2: "U16 I16 F16 BF16",
        4: "U32 I32 F32",
        8: "U64 I64 F64",
    }.items()
    for name in names.split()
}

# Other files that are found under this name. Reading the first three would run code, so nothing here reads them.
_MAGIC = {
    "a pickle; resmol never unpickles": rb"\x80[\x02-\x05]|\x8a\x0al\xfc\x9cF\xf9",
    "a pickle (protocol 0); resmol never unpickles": rb"c[\w.]+\n[\w.]+\n|\([dli][\w.]*\n?[\w.]*\n",
    "a zip archive (torch.save puts a pickle into one); resmol never unpickles": rb"PK(\x03\x04|\x05\x06)",
    "a GGUF file; give it the ending .gguf": rb"GGUF",
    "a Git LFS pointer: the weights themselves were not downloaded": rb"version https://git-lfs",
}


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header; ``start`` and ``end`` are byte offsets into the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A header that keeps all rules.

    Attributes:
        tensors: Name -> entry, in the order of the data.
        metadata: The free text of ``__metadata__``.
        header_bytes: Where the data begins in the file.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    header_bytes: int

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.header_bytes + max((info.end for info in self.tensors.values()), default=0)


class _BrokenRuleError(ValueError):
    """A broken rule, in words; turned into a `CheckpointError` that names the file."""


def read_header(path: Path) -> Header:
    """Read the header of a file; a few kB of it are read.

    Raises:
        CheckpointError: It breaks a rule of the format, or is a pickle (whatever its name).
        DataError: It is not there, or cannot be read.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _damaged(str(path), "it is not a regular file")
            head = file.read(64)
            length = header_length(head, status.st_size, str(path))
            head += file.read(max(0, LENGTH_BYTES + length - len(head)))
    except OSError as error:
        reason = f"cannot read {path}: {error.strerror}"
        raise DataError(reason, fix="check the path and its permissions") from None
    return parse_header(head, status.st_size, str(path))


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file; a named pipe would otherwise block until somebody writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def header_length(head: bytes, file_size: int, origin: str = "the file") -> int:
    """Return the length of the JSON part, checked against the file's size before anything is allocated.

    Args:
        head: At least the first 16 bytes, or the whole file where it is shorter.
        file_size: Bytes of the whole file.
        origin: The file's name, for the message.

    Raises:
        CheckpointError: The length cannot be true, or the file is of another, known kind.
    """
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    begins_well = head[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{"
    if begins_well and length <= min(MAX_HEADER_BYTES, file_size - LENGTH_BYTES):
        return length  # looked at first: a header of 1152 bytes begins like a pickle of protocol 4
    for kind, magic in _MAGIC.items():
        if re.match(magic, head):
            raise CheckpointError(f"{origin} is {kind}", fix="use the model's .safetensors or .gguf file")
    if file_size < LENGTH_BYTES + 2:
        raise _damaged(origin, f"it has {counted(file_size, 'byte')}; a header has at least {LENGTH_BYTES + 2}")
    if length > file_size - LENGTH_BYTES:
        raise _damaged(
            origin, f"it claims a header of {counted(length, 'byte')}, and has {counted(file_size, 'byte')} in all"
        )
    if length > MAX_HEADER_BYTES:
        raise _damaged(origin, f"its header has {counted(length, 'byte')}; at most {MAX_HEADER_BYTES:,} are accepted")
    raise _damaged(origin, "its header does not begin with '{'")


def parse_header(head: bytes, file_size: int, origin: str = "the file") -> Header:
    """Check a header against every rule of the format.

    Args:
        head: The first bytes of the file: the length and the whole JSON part; what follows is ignored.
        file_size: Bytes of the whole file.
        origin: The file's name, for the messages.

    Raises:
        CheckpointError: A rule is broken; the message names the file, the tensor and the rule.
    """
    end = LENGTH_BYTES + header_length(head, file_size, origin)
    try:
        if len(head) < end:
            raise _BrokenRuleError(f"its header ends after {len(head)} of {end} bytes")
        table = _json_object(head[LENGTH_BYTES:end])
        metadata = _metadata(table.pop("__metadata__", {}))
        tensors = {name: tensor_info(name, entry) for name, entry in table.items()}
        ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
        _require_contiguous(ordered, file_size - end)
    except RecursionError:
        raise _damaged(origin, "its header is nested too deeply") from None
    except ValueError as error:  # JSON, UTF-8, over-long numbers and our own rules
        raise _damaged(origin, str(error)[:300]) from None
    return Header(ordered, metadata, end)


def _damaged(origin: str, rule: str) -> CheckpointError:
    return CheckpointError(
        f"{origin} is not a sound safetensors file: {rule}",
        fix="fetch or export the file again; nothing of it was loaded",
    )


def _json_object(text: bytes) -> dict[str, Any]:
    table = parse_json(text.decode("utf-8"))  # a byte order mark is no part of this format
    if not isinstance(table, dict):
        raise _BrokenRuleError("its header is not a JSON object")
    return table


def _metadata(table: Any) -> dict[str, str]:
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise _BrokenRuleError("__metadata__ is not an object of strings")
    return table


def tensor_info(name: str, entry: Any) -> TensorInfo:
    """Check one entry of a header by itself.

    Args:
        name: The tensor's name, for the message.
        entry: What the header maps it to: dtype, shape and data_offsets.

    Raises:
        ValueError: The entry breaks a rule.
    """
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _BrokenRuleError(f"{quoted(name)} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _BrokenRuleError(f"{quoted(name)} has the unknown dtype {quoted(dtype)}")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise _BrokenRuleError(f"the shape of {quoted(name)} is not up to {MAX_DIMENSIONS} whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _BrokenRuleError(f"the data_offsets of {quoted(name)} are not two ascending whole numbers")
    # Python's integers do not overflow, and the bound on each number above keeps their product cheap.
    needed, given = math.prod(shape) * DTYPE_BYTES[dtype], offsets[1] - offsets[0]
    if needed != given:
        raise _BrokenRuleError(f"{quoted(name)}: {dtype} {shape} needs {counted(needed, 'byte')} and has {given:,}")
    return TensorInfo(dtype, tuple(shape), *offsets)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _require_contiguous(tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
    """Refuse holes (a place to hide data), overlaps, and data that no tensor names."""
    end = 0
    for name, tensor in tensors.items():
        if tensor.start != end:
            kind = "overlaps the one before" if tensor.start < end else "leaves a hole before it"
            raise _BrokenRuleError(f"{quoted(name)} {kind}: it begins at byte {tensor.start}, not {end}")
        end = tensor.end
    if end != data_bytes:
        reason = "truncated" if end > data_bytes else "it holds something that has no name"
        raise _BrokenRuleError(f"its tensors cover {counted(end, 'byte')} and its data has {data_bytes:,}: {reason}")


def new_header(dtype: str, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> tuple[Header, bytes]:
    """Lay out a file for tensors of one type, byte for byte as the safetensors library does.

    Args:
        dtype: The format's name of the type, such as F32.
        shapes: Name -> shape.
        metadata: What `__metadata__` is to hold.

    Returns:
        The header, and the bytes that a file with it begins with: a JSON of the same facts, padded with spaces to a
        multiple of 8 bytes. The data follows in the order of the names.
    """
    tensors, start = dict[str, TensorInfo](), 0
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        end = start + math.prod(shape) * DTYPE_BYTES[dtype]
        tensors[name] = TensorInfo(dtype, shape, start, end)
        start = end
    table = {"__metadata__": dict(metadata)} | {
        name: {"dtype": dtype, "shape": info.shape, "data_offsets": (info.start, info.end)}
        for name, info in tensors.items()
    }
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    head = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return Header(tensors, dict(metadata), len(head)), head
