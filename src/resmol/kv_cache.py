"""The keys and values of the tokens seen so far, in buffers of fixed size.

Shapes as in model.py: B batch, K key/value heads, T new tokens, S positions seen so far, Dh head size.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from resmol.hf_config import ModelConfig


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

    @property
    def length(self) -> int:
        """S, the positions stored so far."""
        return self.layers[0].length
