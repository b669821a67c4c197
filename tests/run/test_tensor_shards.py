"""What a rank holds of a tensor is, put together over the ranks, the tensor: compared with DTensor's own gather."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from resmol.run.tensor_shards import TensorShard, shard_of

WORLD = 4


def shards_on_all_ranks(whole: Tensor, mesh: Tensor, placements: list[Shard | Replicate]) -> list[TensorShard]:
    """Return what each rank of a group that only this process simulates holds of a tensor."""
    found = []
    for rank in range(WORLD):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
        try:
            group = DeviceMesh("cpu", mesh)
            split = DTensor.from_local(whole, group, [Replicate()] * mesh.dim(), run_check=False)
            found.append(shard_of(split.redistribute(group, placements), rank, WORLD))
        finally:
            dist.destroy_process_group()
    return found


@pytest.mark.parametrize("shape", [(8, 3), (7, 2, 2), (2, 5), (9,), (1,)], ids=str)
def test_shards_are_ranges_of_the_tensor(shape: tuple[int, ...]) -> None:
    """Rows that divide, that do not, and fewer rows than ranks: empty shards."""
    whole = torch.randn(shape)
    shards = shards_on_all_ranks(whole, torch.arange(WORLD), [Shard(0)])
    assert torch.equal(torch.cat([shard.local.reshape(-1) for shard in shards]), whole.view(-1))
    for shard in shards:
        assert torch.equal(shard.local.reshape(-1), whole.view(-1)[shard.start : shard.end])
        assert (shard.shape, shard.copies, shard.copy) == (shape, 1, 0)
        assert shard.is_whole == (shape == (1,) and shard.local.numel() == 1)


def test_replicas_of_a_hybrid_mesh_hold_the_same_shard() -> None:
    whole = torch.randn(5, 2)
    shards = shards_on_all_ranks(whole, torch.arange(WORLD).view(2, 2), [Replicate(), Shard(0)])
    assert [(shard.start, shard.end, shard.copies, shard.copy) for shard in shards] == [
        (0, 6, 2, 0), (6, 10, 2, 0), (0, 6, 2, 1), (6, 10, 2, 1),
    ]  # fmt: skip


def test_an_ordinary_tensor_is_whole_on_every_rank_and_shares_its_memory() -> None:
    tensor = torch.zeros(3, 2, requires_grad=True)
    shard = shard_of(tensor, 1, 2)
    assert (shard.start, shard.end, shard.copies, shard.copy, shard.is_whole) == (0, 6, 2, 1, True)
    shard.local.fill_(1)
    assert tensor.sum() == 6


def test_another_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="no range of its rows"):
        shards_on_all_ranks(torch.randn(4, 4), torch.arange(WORLD), [Shard(1)])
