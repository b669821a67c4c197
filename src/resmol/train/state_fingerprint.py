"""The fingerprint of a training state: a part of it after each step, in turn, and all of it in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Int
from torch import Tensor

from resmol.config.run_config import RunConfig
from resmol.run.checkpoint import CheckpointTensors
from resmol.run.fingerprint import Fingerprint, hexadecimal
from resmol.train.parallel import Runtime


class StateFingerprint:
    """Takes the fingerprint of weights, moments and averaged weights.

    To find where they lie takes longer than to add up a part, and they stay there until a checkpoint is loaded.
    """

    def __init__(self) -> None:
        self._found: Fingerprint | None = None

    def forget(self) -> None:
        """Look for the tensors again the next time: they were allocated anew."""
        self._found = None

    def of_step(
        self, step: int, tensors: Callable[[], CheckpointTensors], config: RunConfig, runtime: Runtime
    ) -> Int[Tensor, ""]:
        """Return the fingerprint of the part whose turn it is after a step; all ranks take part.

        Args:
            step: The step that is done.
            tensors: Finds the tensors, if that has not been done.
            config: In how many parts all are covered.
            runtime: The ranks.
        """
        if self._found is None:
            self._found = Fingerprint.of(tensors().files, runtime.rank, runtime.world_size)
        total = self._found.sum(step % config.fingerprint_steps, config.fingerprint_steps)
        runtime.all_reduce_sum(total)
        return total


def whole_fingerprint(tensors: CheckpointTensors, runtime: Runtime) -> str:
    """Return the fingerprint of all tensors. Ranks that hold parts of them all take part; others may call it alone."""
    alone = Fingerprint.of(tensors.files)
    if alone.is_whole():
        return hexadecimal(alone.sum())
    total = Fingerprint.of(tensors.files, runtime.rank, runtime.world_size).sum()
    runtime.all_reduce_sum(total)
    return hexadecimal(total)
