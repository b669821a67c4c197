"""Average the weights over the newest part of all steps so far: polynomial-decay averaging, which needs no planned end.

After update n of the average, ``average += c_n x (weights - average)`` with ``c_n = (eta + 1) / (n + eta)`` (Shamir &
Zhang 2013, section 4). The weights of update i then count in proportion to about ``i^eta``, at whatever n one stops. An
exponential moving average has a half-life in steps instead, which is too long at the beginning of a run or too short
at its end, and means something else with another batch size.

``eta`` follows from a fraction f of the run: ``eta = 2 / f - 2`` gives the averaged weights the mean age ``f n / 2`` of
a plain mean over the last f x n updates. f = 1 is eta = 0, the plain mean of all of them.

The average is read by nothing that training computes, and c is a function of the step, so it is resumed bit for bit
from its tensors alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from resmol.config.run_config import AveragingConfig
from resmol.model.llama import CausalLM
from resmol.run.checkpoint import weight_tensors
from resmol.run.tensor_shards import local_of


class WeightAverage:
    """The averaged weights of a model, in float32, on its device.

    Attributes:
        tensors: The average by Hugging Face's names; the initial weights before the first update.
    """

    def __init__(self, model: CausalLM, config: AveragingConfig) -> None:
        """Begin at the weights as they are."""
        self._model, self._config = model, config
        self._weights = weight_tensors(model)
        self.tensors = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Bring the weights after ``step`` into the average, at every ``averaging.every``-th step."""
        number, remainder = divmod(step, self._config.every)
        if remainder == 0:
            weight = update_weight(number, self._config.fraction)
            torch._foreach_lerp_(
                [*map(local_of, self.tensors.values())], [*map(local_of, self._weights.values())], weight
            )

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Let the model compute with the average for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Swap the numbers themselves, one tensor at a time: FSDP2 and DDP know the memory of the weights."""
        for weights, average in zip(self._weights.values(), self.tensors.values(), strict=True):
            ours, other = local_of(weights), local_of(average)
            before = ours.clone()
            ours.copy_(other)
            other.copy_(before)


def update_weight(number: int, fraction: float) -> float:
    """Return the share of the newest weights in the average.

    Args:
        number: Updates of the average with this one, from 1.
        fraction: Share of the updates that the average reaches over, above 0 and at most 1.
    """
    eta = 2 / fraction - 2
    return (eta + 1) / (number + eta)
