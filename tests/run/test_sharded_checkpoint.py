"""A checkpoint does not know how many ranks wrote it: its bytes are those of one process, and any ranks can read it."""

from __future__ import annotations

import errno
import itertools
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from several_ranks import Strategy, ThreadRanks, held_by, on_all
from torch import Tensor

from resmol.config.run_config import RunConfig
from resmol.errors import DiskFull, ResmolError
from resmol.run import checkpoint as module
from resmol.run import checkpoint_load, tensor_files
from resmol.run.checkpoint import CheckpointTensors, allocate_moments, commit_checkpoint, stage_checkpoint
from resmol.run.checkpoint_load import load_tensors
from resmol.run.checkpoint_manifest import WEIGHTS, Manifest, SavedState, open_checkpoint
from resmol.run.ranks import Ranks
from resmol.run.tensor_shards import shard_of
from resmol.train.build import new_state
from resmol.train.parallel import Runtime

SAVED = SavedState(
    step=5, tokens_seen=0, windows_seen=0, config_sha256="", data_fingerprint="", ledger_head="", random_state="",
    permanent=False,
)  # fmt: skip
WRITERS: list[tuple[Strategy, int]] = [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("fsdp", 7), ("hsdp", 4)]


@pytest.fixture(scope="module")
def whole(tiny_config: RunConfig) -> CheckpointTensors:
    """Weights, moments and averages, all random; 7 ranks divide nothing, and hold nothing of some."""
    state = new_state(tiny_config.replace({"averaging.fraction": 0.5}), Runtime.single())
    allocate_moments(state.optimizer, 1)
    files = state.tensors().files
    for tensor in [tensor for group in files.values() for tensor in group.values()]:
        tensor.data.normal_()
    return CheckpointTensors(tiny_config.model, files)


def save(folder: Path, tensors: CheckpointTensors, strategy: Strategy, world_size: int) -> list[Manifest | Exception]:
    """Let each rank write what it holds."""
    folder.mkdir(exist_ok=True)
    held = [held_by(tensors.files, strategy, rank, world_size) for rank in range(world_size)]

    def work(ranks: Ranks) -> Manifest:
        own = CheckpointTensors(tensors.config, held[ranks.rank])
        return commit_checkpoint(stage_checkpoint(folder, SAVED, own, parent=None, ranks=ranks), ranks)

    return on_all(world_size, work)


@pytest.fixture(scope="module")
def of_one(whole: CheckpointTensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that one process writes."""
    folder = tmp_path_factory.mktemp("one")
    save(folder, whole, "ddp", 1)
    return folder / "step-00000005"


@pytest.mark.parametrize(("strategy", "world_size"), WRITERS)
def test_the_bytes_are_those_of_one_process(
    whole: CheckpointTensors, of_one: Path, tmp_path: Path, strategy: Strategy, world_size: int
) -> None:
    manifests = save(tmp_path, whole, strategy, world_size)
    assert {file.name: file.read_bytes() for file in (tmp_path / of_one.name).iterdir()} == {
        file.name: file.read_bytes() for file in of_one.iterdir()
    }
    assert manifests == [open_checkpoint(of_one).manifest] * world_size


@pytest.mark.parametrize(("strategy", "world_size"), WRITERS)
def test_each_rank_reads_what_it_holds(
    whole: CheckpointTensors, of_one: Path, strategy: Strategy, world_size: int
) -> None:
    expected = [held_by(whole.files, strategy, rank, world_size) for rank in range(world_size)]
    empty = {
        file: {name: torch.zeros(tensor.shape) for name, tensor in group.items()} for file, group in whole.files.items()
    }
    held = [held_by(empty, strategy, rank, world_size) for rank in range(world_size)]

    def work(ranks: Ranks) -> None:
        for file, group in held[ranks.rank].items():
            load_tensors(open_checkpoint(of_one), file, group, ranks)

    assert on_all(world_size, work) == [None] * world_size
    for rank in range(world_size):
        for file, group in held[rank].items():
            for name, tensor in group.items():
                assert torch.equal(shard_of(tensor).local, shard_of(expected[rank][file][name]).local)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_write_equal_shares(whole: CheckpointTensors, world_size: int) -> None:
    """Under DDP each rank could write all; no byte is written twice, and none writes much more than its share."""
    written = []
    for rank in range(world_size):
        own = CheckpointTensors(whole.config, held_by(whole.files, "ddp", rank, world_size))
        pieces = module._pieces(own, ThreadRanks.alone(rank, world_size))
        written.append(sum(piece.shard.local.numel() * 4 for piece in pieces))
    assert sum(written) == whole.bytes
    assert max(written) < 1.1 * whole.bytes / world_size


def fails_on_rank_1(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    genuine = module.write_shard

    def write(path: Path, header: Any, name: str, shard: Any, values: Tensor) -> None:
        if shard.start > 0:  # rank 0 holds the first rows
            raise error
        genuine(path, header, name, shard, values)

    monkeypatch.setattr(module, "write_shard", write)


def test_a_rank_whose_disk_is_full_stops_the_save_on_all(
    whole: CheckpointTensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_on_rank_1(monkeypatch, OSError(errno.ENOSPC, "no space"))
    for error in save(tmp_path, whole, "fsdp", 2):
        assert isinstance(error, DiskFull), error
        assert f"the checkpoint needs {whole.bytes:,} bytes" in error.what
    assert list(tmp_path.iterdir()) == []


def test_a_fault_between_memory_and_disk_is_noticed(
    whole: CheckpointTensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit flips on the way to the file, on one of four ranks."""
    genuine, calls = tensor_files._read_into, itertools.count()

    def read(file: FileIO, content: memoryview | bytearray) -> int:
        size = genuine(file, content)
        if file.writable() and next(calls) == 20:
            content[-1] ^= 1
        return size

    monkeypatch.setattr(tensor_files, "_read_into", read)
    errors = save(tmp_path, whole, "fsdp", 4)
    assert {type(error) for error in errors} == {OSError}
    assert all("other bytes came back for" in str(error) for error in errors)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_changes_while_it_is_read_is_noticed(
    whole: CheckpointTensors, of_one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit flips on the way from the file to one of two ranks, after rank 0 has verified the file."""
    genuine = checkpoint_load.read_shard

    def read(path: Path, header: Any, name: str, shard: Any) -> Tensor:
        values = genuine(path, header, name, shard)
        if shard.start > 0 and name == "model.norm.weight":
            values.view(torch.int32)[-1] ^= 1
        return values

    monkeypatch.setattr(checkpoint_load, "read_shard", read)
    held = [held_by(whole.files, "fsdp", rank, 2) for rank in range(2)]
    opened = open_checkpoint(of_one)
    outcomes = on_all(2, lambda ranks: load_tensors(opened, WEIGHTS, held[ranks.rank][WEIGHTS], ranks))
    assert all(isinstance(error, ResmolError) and "model.norm.weight" in error.what for error in outcomes), outcomes
