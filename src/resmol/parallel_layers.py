"""Linear layers that take the same input: apart for training, as one large matrix for speaking."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ParallelLayers(nn.Module):
    """A module, some of whose linear layers (without biases) all take the same input.

    A token that is added to a text needs every weight and hardly any arithmetic, and one large product reads weights
    faster than several small ones. `join` lays them side by side for that. Where gradients are wanted, each layer is
    a product of its own all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self._joint: Tensor | None = None

    def parallel(self) -> tuple[nn.Linear, ...]:
        """Return the layers that take the same input."""
        raise NotImplementedError

    def join(self) -> None:
        """Make each weight a view, without a gradient, of one matrix; names, shapes and values stay."""
        self._joint = torch.cat([layer.weight.detach() for layer in self.parallel()])
        for layer, rows in zip(self.parallel(), self._split(self._joint, 0), strict=True):
            layer.weight = nn.Parameter(rows, requires_grad=False)

    @property
    def is_joined(self) -> bool:
        """Whether the weights are views of one matrix; a copy, another type or another device takes them apart."""
        return self._joint is not None and self._joint.data_ptr() == self.parallel()[0].weight.data_ptr()

    def project(self, x: Float[Tensor, "*B D"]) -> tuple[Tensor, ...]:
        """Return what each of the layers makes of ``x``."""
        if self._joint is None or torch.is_grad_enabled() or not self.is_joined:  # the joint matrix has no gradient
            return tuple(layer(x) for layer in self.parallel())
        return self._split(F.linear(x, self._joint), -1)

    def _split(self, joint: Tensor, dim: int) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = joint.split([layer.out_features for layer in self.parallel()], dim)
        return parts
