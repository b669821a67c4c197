"""What one rank holds of a tensor: all of it, or a range of its rows.

FSDP2 (`torch.distributed.fsdp.fully_shard`) makes each parameter a DTensor that is split along its first dimension, so
a rank holds a contiguous range of the tensor's elements, and of its bytes in a file. The ranges follow `torch.chunk`:
they may differ in size, and the last ones may be empty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TensorShard:
    """The part of a tensor that a rank holds.

    Attributes:
        shape: Of the whole tensor.
        start: Index of the part's first element in the whole tensor, flattened.
        local: The part: rows of the tensor, in its own memory; may be empty.
        copies: How many ranks hold the same part: all ranks under DDP, the replicas of a hybrid-sharded mesh.
        copy: Which of them this rank is, from 0.
    """

    shape: tuple[int, ...]
    start: int
    local: Tensor
    copies: int = 1
    copy: int = 0

    @property
    def end(self) -> int:
        """Index after the part's last element in the whole tensor, flattened."""
        return self.start + self.local.numel()

    @property
    def is_whole(self) -> bool:
        """Whether the part is the tensor."""
        return self.local.numel() == math.prod(self.shape)


def local_of(tensor: Tensor) -> Tensor:
    """Return the values that this rank holds of a tensor, wherever they lie in it; they share the tensor's memory."""
    placed: Any = tensor
    return tensor if getattr(placed, "device_mesh", None) is None else placed.to_local().detach()


def shard_of(tensor: Tensor, rank: int = 0, world_size: int = 1) -> TensorShard:
    """Return what this rank holds of a tensor; its values share the tensor's memory.

    Args:
        tensor: An ordinary tensor, of which every rank holds all, or a DTensor.
        rank: This rank.
        world_size: How many ranks hold an ordinary tensor.

    Raises:
        ValueError: A DTensor is split along another dimension than the first, or more than once.
    """
    placed: Any = tensor
    # A DTensor is known by its attributes: to import its class takes half as long as to import PyTorch.
    mesh = getattr(placed, "device_mesh", None)
    if mesh is None:
        return TensorShard(tuple(tensor.shape), 0, tensor.detach(), world_size, rank)
    parts, part, copies, copy = 1, 0, 1, 0
    for size, at, placement in zip(mesh.shape, mesh.get_coordinate(), placed.placements, strict=True):
        if placement.is_replicate():
            copies, copy = copies * size, copy * size + at
        elif placement.is_shard(0) and parts == 1:
            parts, part = size, at
        else:
            raise ValueError(f"a tensor with the placements {placed.placements} is no range of its rows")
    rows = tensor.shape[0]
    first = min(rows, part * math.ceil(rows / parts))
    start = first * math.prod(tensor.shape[1:])
    return TensorShard(tuple(tensor.shape), start, placed.to_local().detach(), copies, copy)
