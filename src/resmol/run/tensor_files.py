"""Safetensors files that are written and read in ranges: each rank its part of each tensor, at its place in the file.

A range of a tensor's rows is a range of the file's bytes. So ranks that hold parts of a tensor write one file together,
and none of them gathers the tensor; and any other number of ranks can read their parts of it.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from resmol.run.checkpoint_manifest import corrupt
from resmol.run.tensor_shards import TensorShard, shard_of
from resmol.system.safetensors_header import DTYPE_BYTES, Header, new_header, read_header

STORED_TYPES = {  # safetensors' names; every type that its header may name
    "BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in STORED_TYPES.items()}
BLOCK = 1 << 22  # bytes that are read at a time to be compared or hashed


def layout(tensors: Mapping[str, Tensor]) -> tuple[Header, bytes]:
    """Return the header of a file for these tensors, which are of one type, and its bytes.

    It is a function of names, shapes and type, so each rank gets the same one.
    """
    (dtype,) = {_NAMES[tensor.dtype] for tensor in tensors.values()}
    return new_header(dtype, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, {"format": "pt"})


def create_tensor_file(path: Path, header: Header, head: bytes) -> None:
    """Create a file in its full size, without the values; raises what `write_shard` raises."""
    with path.open("x+b", buffering=0) as file:
        file.truncate(header.file_bytes)
        _write_and_compare(file, 0, memoryview(head), "other bytes came back for the header")


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of whole tensors, which are of one type (`OSError`: the disk failed, or is full)."""
    header, head = layout(tensors)
    create_tensor_file(path, header, head)
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous()
        write_shard(path, header, name, shard_of(values), values)


def write_shard(path: Path, header: Header, name: str, shard: TensorShard, values: Tensor) -> None:
    """Write a rank's part of a tensor to its place, read it back, and compare.

    Args:
        path: A file of `create_tensor_file`.
        header: Its header.
        name: The tensor.
        shard: Where the part lies in it.
        values: The part, in main memory and contiguous.

    Raises:
        OSError: The disk failed, is full, or gives other bytes back.
    """
    with path.open("r+b", buffering=0) as file:
        _write_and_compare(file, _place(header, name, shard), as_bytes(values), f"other bytes came back for {name}")


def read_shard(path: Path, header: Header, name: str, shard: TensorShard) -> Tensor:
    """Read a rank's part of a tensor (`CheckpointError`: the file ends within it; `OSError`: it cannot be read)."""
    info = header.tensors[name]
    return _read(path, name, _place(header, name, shard), tuple(shard.local.shape), info.dtype)


def stored_tensor(path: Path, name: str, header: Header | None = None) -> Tensor:
    """Read one tensor of a safetensors file.

    It is read and not mapped, which costs the same time: some file systems cannot map files, a mapped file that shrinks
    kills the process, and its pages count as the process's memory.

    Args:
        path: The file.
        name: The tensor.
        header: The file's header; None reads it.

    Raises:
        CheckpointError: The file ends within the tensor, or its header breaks a rule.
        OSError: It cannot be read.
    """
    header = header or read_header(path)
    info = header.tensors[name]
    return _read(path, name, header.header_bytes + info.start, info.shape, info.dtype)


def stored_digest(path: Path, header: Header, name: str, start: int = 0, end: int | None = None) -> str:
    """Return the sha256 of a tensor's bytes in a file, or of some elements, without holding them.

    Args:
        path: The file.
        header: Its header.
        name: The tensor.
        start: The first element, of the tensor flattened.
        end: The one after the last; None is the tensor's end.

    Raises:
        OSError: They cannot be read.
    """
    info, found = header.tensors[name], hashlib.sha256()
    size = DTYPE_BYTES[info.dtype]
    first, last = info.start + start * size, info.end if end is None else info.start + end * size
    with path.open("rb", buffering=0) as file:
        file.seek(header.header_bytes + first)
        block = bytearray(BLOCK)
        for at in range(first, last, BLOCK):
            del block[last - at :]
            if _read_into(file, block) != len(block):
                raise OSError(errno.EIO, f"the file ends within {name}", str(path))
            found.update(block)
    return found.hexdigest()


def as_bytes(values: Tensor) -> memoryview:
    """Return the bytes of a tensor in main memory, which must be contiguous; nothing is copied."""
    return values.detach().view(-1).view(torch.uint8).numpy().data


def _place(header: Header, name: str, shard: TensorShard) -> int:
    """Return where a part of a tensor begins in the file."""
    info = header.tensors[name]
    return header.header_bytes + info.start + shard.start * DTYPE_BYTES[info.dtype]


def _read(path: Path, name: str, place: int, shape: Sequence[int], dtype: str) -> Tensor:
    tensor = torch.empty(shape, dtype=STORED_TYPES[dtype])
    if tensor.numel():
        content = as_bytes(tensor)
        with path.open("rb", buffering=0) as file:
            file.seek(place)
            if _read_into(file, content) != len(content):
                raise corrupt(path, f"ends within {name}")
    return tensor


def _read_into(file: FileIO, content: memoryview | bytearray) -> int:
    """Fill a buffer, with several reads where the system gives less than asked; return how many bytes there were."""
    view, done = memoryview(content), 0
    while done < len(view) and (count := file.readinto(view[done:])):
        done += count
    return done


def _write_and_compare(file: FileIO, place: int, content: memoryview, fault: str) -> None:
    """Write a buffer, read it back, and compare (`OSError`: other bytes came back; the message says what ``fault``)."""
    file.seek(place)
    done = 0
    while done < len(content):  # the system may take less than asked
        done += file.write(content[done:])
    file.seek(place)
    block = bytearray(BLOCK)
    for at in range(0, len(content), BLOCK):
        expected = content[at : at + BLOCK]
        del block[len(expected) :]
        if _read_into(file, block) != len(expected) or block != expected:
            raise OSError(errno.EIO, f"{fault} than were written", file.name)
