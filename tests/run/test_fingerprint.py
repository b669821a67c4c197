"""The checksum is the sum that it says, however the tensors are divided, and shows what changed or moved."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from resmol.run.fingerprint import ROW, Fingerprint, hexadecimal, is_of_step, recorded_form
from resmol.run.tensor_files import write_tensor_file
from resmol.run.tensor_shards import TensorShard

WORD = 1 << 64


def tensors() -> dict[str, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    sizes = {"b": {"x": (5, 3), "w": (2 * ROW + 7,), "v": (ROW,)}, "a": {"u": (3, ROW - 1), "t": (5, 3)}}
    return {file: {name: torch.randn(size, generator=draw) for name, size in group.items()}
            for file, group in sizes.items()}  # fmt: skip


def factor(stream: int, index: int) -> int:
    """SplitMix64, as published: the state is a multiple of the golden gamma."""
    mixed = ((stream << 40) + index) * 0x9E3779B97F4A7C15 % WORD
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % WORD
    return (mixed ^ (mixed >> 31)) | 1


def by_hand(files: dict[str, dict[str, Tensor]]) -> str:
    """The definition in Python's integers, element by element."""
    columns, total, row = [factor(1, column) for column in range(ROW)], 0, 0
    for file in sorted(files):
        for name in sorted(files[file]):
            bits = files[file][name].reshape(-1).view(torch.int32).tolist()
            for index, value in enumerate(bits):
                total += value * columns[index % ROW] * factor(2, row + index // ROW)
            row += math.ceil(len(bits) / ROW)
    return f"{total % WORD:016x}"


def whole(files: dict[str, dict[str, Tensor]]) -> str:
    return hexadecimal(Fingerprint.of(files).sum())


def test_it_is_the_sum_of_the_definition() -> None:
    assert whole(tensors()) == by_hand(tensors())


def test_parts_and_ranks_add_up_to_the_whole() -> None:
    files = tensors()
    for parts in (2, 3, 7, 50):
        assert hexadecimal(sum((Fingerprint.of(files).sum(k, parts) for k in range(parts)), torch.tensor(0))) == whole(
            files
        )
    copies = [Fingerprint.of(files, rank, 3).sum(1, 2) for rank in range(3)]
    assert hexadecimal(sum(copies, torch.tensor(0))) == hexadecimal(Fingerprint.of(files).sum(1, 2))
    flat = [files[file][name].reshape(-1) for file in sorted(files) for name in sorted(files[file])]
    total = torch.tensor(0)
    for rank in range(3):  # ranges that end within rows, as FSDP2 makes them

        def shard(index: int, rank: int = rank) -> TensorShard:
            cuts = [len(flat[index]) * number // 3 for number in (rank, rank + 1)]
            return TensorShard(tuple(flat[index].shape), cuts[0], flat[index][cuts[0] : cuts[1]])

        total += Fingerprint([len(values) for values in flat], shard, torch.device("cpu")).sum()
    assert hexadecimal(total) == whole(files)


def test_files_have_the_fingerprint_of_what_was_written(tmp_path: Path) -> None:
    for file, group in tensors().items():
        write_tensor_file(tmp_path / file, group)
    stored = Fingerprint.of_files(tmp_path, tensors())
    assert hexadecimal(stored.sum()) == whole(tensors())
    assert is_of_step(recorded_form(stored.sum(2, 3), 3), 5, stored)
    assert not any(
        is_of_step(forged, 5, stored) for forged in ("3:0", "0:0", "", ":", None, 7, "3:" + whole(tensors()))
    )


@pytest.mark.parametrize("what", ["last bit", "sign of zero", "elements", "rows", "tensors", "halves"])
def test_what_changed_or_moved_shows(what: str) -> None:
    files = tensors()
    files["b"]["v"][5:8] = torch.tensor([0.0, 1.0, 2.0])
    before, v, w = whole(files), files["b"]["v"], files["b"]["w"]
    if what == "last bit":
        v.view(torch.int32)[77] ^= 1
    elif what == "sign of zero":
        v[5] = -0.0
    elif what == "elements":
        v[6], v[7] = 2.0, 1.0
    elif what == "rows":
        w[:ROW], w[ROW : 2 * ROW] = w[ROW : 2 * ROW].clone(), w[:ROW].clone()
    elif what == "tensors":
        files["a"]["t"], files["b"]["x"] = files["b"]["x"], files["a"]["t"]
    else:
        v.copy_(v.roll(ROW // 2))
    assert whole(files) != before
