"""The held-out losses in a ledger, and what follows from them: the best checkpoint, and whether the loss has turned."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, TypeAlias

from resmol.run.ledger import Record, effective

WeightsKind: TypeAlias = Literal["last", "averaged"]  # those of the last step, or their average

LOSS_FIELDS: dict[WeightsKind, str] = {"last": "loss", "averaged": "averaged_loss"}  # of an ``eval`` record
# Evaluations use the same text each time, so they scatter by much less than this around a trend.
TURN_MARGIN = 0.01  # of the lowest loss; a loss within it is no worse
TURN_EVALUATIONS = 3  # in a row that are worse than the lowest


def held_out_losses(records: list[Record], weights: WeightsKind = "last") -> dict[int, float]:
    """Return step -> held-out loss in the run's history, in order, for one of the two sets of weights."""
    field = LOSS_FIELDS[weights]
    return {step: record[field] for step, record in sorted(effective(records, "eval").items()) if field in record}


def best_steps(records: list[Record], present: Collection[int]) -> dict[WeightsKind, int]:
    """Return, for each set of weights, the step of the checkpoint with the lowest held-out loss; the first of equals.

    Args:
        records: The records of a ledger.
        present: Steps of the checkpoints to choose from; those after which nothing was evaluated do not count.
    """
    best: dict[WeightsKind, int] = {}
    for weights in LOSS_FIELDS:
        losses = {step: loss for step, loss in held_out_losses(records, weights).items() if step in present}
        if losses:
            best[weights] = min(losses, key=lambda step: losses[step])
    return best


def has_turned(losses: Sequence[float]) -> bool:
    """Return whether the newest of these held-out losses completes a row of TURN_EVALUATIONS above the lowest one.

    It is true once for each lowest loss: the evaluations after the row say nothing new.
    """
    if not losses:
        return False
    lowest = losses.index(min(losses))
    worse = [loss > losses[lowest] * (1 + TURN_MARGIN) for loss in losses[lowest + 1 :]]
    rows = [all(worse[end - TURN_EVALUATIONS : end]) for end in range(TURN_EVALUATIONS, len(worse) + 1)]
    return bool(rows) and rows[-1] and not any(rows[:-1])
