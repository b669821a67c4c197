"""The keys and values of the tokens seen so far, in buffers of fixed size.

A slot holds one token of each row. Rows are right-aligned: texts of different lengths end in the same slot, begin in
different ones, and each counts its positions from its own beginning.

Shapes as in `llama`: B batch, K key/value heads, T new tokens, S slots filled by then, Dh head size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resmol.config.model_config import ModelConfig

Mask: TypeAlias = Bool[Tensor, "#B 1 T S"] | None  # True: may be attended to; one for the batch, or one for each row


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
        capacity: The most slots that will be filled.
        dtype: Type of keys and values.
        device: Where they live.

    Attributes:
        starts: For texts of different lengths in one batch: the slot in which each row's text begins. None where all
            rows begin in the first slot.
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
        """The slots filled so far."""
        return self.layers[0].length

    def positions(self, count: int) -> Int[Tensor, "*B T"]:
        """Return the positions of the next ``count`` tokens: [T], or [B, 1, T] where rows begin in different slots."""
        slots = self._next_slots(count)
        return slots if self.starts is None else slots - self.starts[:, None, None]

    def mask(self, count: int) -> Mask:
        """Return which slots the next ``count`` tokens may attend to: those of their own text, up to themselves.

        None stands for plain causal attention over an empty cache, or a single new token that sees every slot.
        """
        if self.starts is None and (self.length == 0 or count == 1):
            return None
        new, seen = self._next_slots(count)[:, None], torch.arange(self.length + count, device=self._device)
        if self.starts is None:
            return (new >= seen)[None, None]
        return ((new >= seen) & (seen >= self.starts[:, None, None]))[:, None]

    def _next_slots(self, count: int) -> Int[Tensor, " T"]:
        return torch.arange(self.length, self.length + count, device=self._device)

    @property
    def _device(self) -> torch.device:
        return self.layers[0].keys.device

    def row(self, number: int, end: int, length: int) -> KVCache:
        """Return a view of the slots [end - length, end) of one row; what is written into it is written here."""
        part, begin = copy.copy(self), end - length
        part.layers, part.capacity = [copy.copy(layer) for layer in self.layers], length
        for layer in part.layers:
            layer.keys = layer.keys[number : number + 1, :, begin:end]
            layer.values = layer.values[number : number + 1, :, begin:end]
        return part

    def align(self, starts: Sequence[int], length: int) -> None:
        """Declare the rows filled up to ``length``, the text of each beginning in its own slot."""
        self.starts = torch.tensor(starts, device=self._device)
        for layer in self.layers:
            layer.length = length

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in the given order."""
        index = torch.tensor(rows, device=self._device)
        self.starts = None if self.starts is None else self.starts[index]
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[index], layer.values[index]
