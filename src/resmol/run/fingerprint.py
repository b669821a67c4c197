"""A fingerprint of weights and moments for each step's record: a checksum that ranks compute where the tensors are.

The tensors follow each other in the order of their names and are cut into rows of `ROW` elements; each begins a new
row. The bits of an element in row r and column c are an integer x, and the fingerprint is

    sum of x * a[c] * b[r]  modulo 2^64,  with odd factors a and b.

A sum has no order, so ranks that hold parts add theirs up to the same number. A single changed element always shows,
since an odd factor can be divided by modulo 2^64; elements or tensors that change places show because each place has
its own factor. It is a checksum, made to be cheap: whoever wants to can make other weights that have the same. The
sha256 of each tensor in a checkpoint's manifest is what binds those.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from resmol.run.tensor_files import stored_tensor
from resmol.run.tensor_shards import TensorShard, shard_of
from resmol.system.safetensors_header import read_header

ROW = 1 << 14
CPU_ROWS, OTHER_ROWS = 4, 1 << 10  # multiplied at a time: what the cache holds, what keeps an accelerator busy
MOST_PARTS = 10**9
COLUMN_FACTORS, ROW_FACTORS = 1, 2  # where the two streams of factors begin


class Fingerprint:
    """Where tensors lie in the order of all, as far as this rank holds them: made once, summed often."""

    def __init__(self, sizes: Sequence[int], shard: Callable[[int], TensorShard], device: torch.device) -> None:
        """Number the rows.

        Args:
            sizes: Elements of each tensor, in order.
            shard: Returns what is here of a tensor, float32, by its index.
            device: Where the tensors are.
        """
        self._shard = shard
        self._bases = [0, *accumulate(math.ceil(size / ROW) for size in sizes)]
        self._columns, self._rows = (
            _factors(COLUMN_FACTORS, ROW, device),
            _factors(ROW_FACTORS, self._bases[-1], device),
        )
        self._most_rows = CPU_ROWS if device.type == "cpu" else OTHER_ROWS

    @classmethod
    def of(cls, files: Mapping[str, Mapping[str, Tensor]], rank: int = 0, world_size: int = 1) -> Fingerprint:
        """Return the fingerprint of tensors in memory, by file and name; their values may change later.

        Args:
            files: The tensors.
            rank: This rank, from 0.
            world_size: How many ranks share the work; each holds all of the ordinary tensors.
        """
        tensors = [group[name] for _, group in sorted(files.items()) for name in sorted(group)]
        shards = [shard_of(tensor, rank, world_size) for tensor in tensors]
        return cls([math.prod(shard.shape) for shard in shards], shards.__getitem__, shards[0].local.device)

    @classmethod
    def of_files(cls, folder: Path, files: Iterable[str]) -> Fingerprint:
        """Return the fingerprint of safetensors files; a tensor is read when its turn comes (`CheckpointError`)."""
        headers = {file: read_header(folder / file) for file in sorted(files)}
        items = [(file, name) for file, header in headers.items() for name in sorted(header.tensors)]

        def read(index: int) -> TensorShard:
            file, name = items[index]
            return shard_of(stored_tensor(folder / file, name, headers[file]))

        return cls([math.prod(headers[file].tensors[name].shape) for file, name in items], read, torch.device("cpu"))

    def is_whole(self) -> bool:
        """Return whether all of each tensor is here, and this rank shares the work with no other."""
        shards = map(self._shard, range(len(self._bases) - 1))
        return all(shard.is_whole and shard.copies == 1 for shard in shards)

    def sum(self, part: int = 0, parts: int = 1) -> Int[Tensor, ""]:
        """Return what this rank contributes to the fingerprint of one of ``parts`` equal parts of all rows."""
        first, last = (self._bases[-1] * number // parts for number in (part, part + 1))
        total = torch.zeros((), dtype=torch.int64, device=self._columns.device)
        for index in range(bisect.bisect_right(self._bases, first) - 1, len(self._bases) - 1):
            base, end = self._bases[index : index + 2]
            if base >= last:
                break
            total += self._sum_of(self._shard(index), base, max(first, base) - base, min(last, end) - base)
        return total

    def _sum_of(self, shard: TensorShard, base: int, first: int, last: int) -> Int[Tensor, ""]:
        """Add up rows of a tensor, those that fall to this copy of it; its first row is row ``base`` of all."""
        first, last = (first + (last - first) * number // shard.copies for number in (shard.copy, shard.copy + 1))
        start, stop = max(first * ROW, shard.start), min(last * ROW, shard.end)
        bits = shard.local.reshape(-1).view(torch.int32)
        total = torch.zeros((), dtype=torch.int64, device=bits.device)
        while start < stop:
            row, column = divmod(start, ROW)
            rows = 0 if column else min((stop - start) // ROW, self._most_rows)
            end = start + rows * ROW if rows else min(stop, (row + 1) * ROW)  # part of a row at either end of a range
            block = bits[start - shard.start : end - shard.start].view(max(rows, 1), -1)
            sums = block.to(torch.int64).mul_(self._columns[column : column + block.shape[1]]).sum(dim=1)
            total += (sums * self._rows[base + row : base + row + len(block)]).sum()
            start = end
        return total


def hexadecimal(total: Int[Tensor, ""] | int) -> str:
    """Return the 16 digits of a fingerprint whose contributions of all ranks have been added up."""
    return f"{int(total) % (1 << 64):016x}"


def recorded_form(total: Int[Tensor, ""] | int, parts: int) -> str:
    """Return the fingerprint of the part whose turn it was, as a step's record has it: ``PARTS:DIGITS``."""
    return f"{parts}:{hexadecimal(total)}"


def is_of_step(recorded: Any, step: int, tensors: Fingerprint) -> bool:
    """Return whether what the record of a step has as its fingerprint is that of tensors, which are all here."""
    parts = str(recorded).partition(":")[0]
    if not (parts.isascii() and parts.isdecimal() and 0 < int(parts) <= MOST_PARTS):
        return False
    return bool(recorded == recorded_form(tensors.sum(step % int(parts), int(parts)), int(parts)))


@functools.cache
def _factors(stream: int, count: int, device: torch.device) -> Int[Tensor, " N"]:
    """Return odd numbers that look random: SplitMix64 (Steele, Lea & Flood 2014) at the index of each."""
    mixed = (np.arange(count, dtype=np.uint64) + np.uint64(stream << 40)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return torch.from_numpy(((mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)).view(np.int64)).to(device)
