"""The keys and values of the tokens seen so far, in buffers of fixed size.

Shapes as in model.py: B batch, K key/value heads, T new tokens, S positions seen so far, Dh head size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resmol.config.model_config import ModelConfig


class LayerCache:
    """Keys and values of one block."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def extend(
        self, keys: Float[Tensor, "B K T Dh"], values: Float[Tensor, "B K T Dh"]
    ) -> tuple[Float[Tensor, "B K S Dh"], Float[Tensor, "B K S Dh"]]:
        """Write the new keys and values behind the old ones and return all of them, as views."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """One `LayerCache` for each block, all of the same length.

    Args:
        config: The architecture.
        batch_size: B.
        capacity: The most positions that will be stored.
        dtype: Type of keys and values.
        device: Where they live.

    Attributes:
        starts: For texts of different lengths in one batch: how many places of a row are empty before its text
            begins. None where all rows begin at the first place.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        where = device or torch.device("cpu")
        self.capacity = capacity
        self.layers = [LayerCache(shape, dtype, where) for _ in range(config.num_hidden_layers)]
        self.starts: Int[Tensor, " B"] | None = None

    @property
    def length(self) -> int:
        """S, the positions stored so far."""
        return self.layers[0].length

    def row(self, number: int, end: int, length: int) -> KVCache:
        """Return the places [end - length, end) of one row as a cache of their own, which writes into this one."""
        part, begin = copy.copy(self), end - length
        part.layers, part.capacity = [copy.copy(layer) for layer in self.layers], length
        for layer in part.layers:
            layer.keys = layer.keys[number : number + 1, :, begin:end]
            layer.values = layer.values[number : number + 1, :, begin:end]
        return part

    def align(self, starts: Sequence[int], length: int) -> None:
        """Declare the rows filled up to ``length``, the text of each beginning at its own place."""
        self.starts = torch.tensor(starts, device=self.layers[0].keys.device)
        for layer in self.layers:
            layer.length = length

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these, which move together in the given order."""
        index = torch.tensor(rows, device=self.layers[0].keys.device)
        self.starts = None if self.starts is None else self.starts[index]
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[index], layer.values[index]
