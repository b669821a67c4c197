"""Held-out losses of a ledger: which count, which is the lowest, and when they have turned."""

from __future__ import annotations

import pytest

from resmol.run.held_out import best_steps, has_turned, held_out_losses
from resmol.run.ledger import Record


def evaluation(step: int, loss: float, **more: float) -> Record:
    return {"kind": "eval", "step": step, "loss": loss, **more}


RECORDS = [
    evaluation(1, 5.0, averaged_loss=5.5),
    evaluation(2, 3.0, averaged_loss=4.0),
    evaluation(3, 2.0, averaged_loss=4.1),
    {"kind": "rewind", "from_step": 3, "to_step": 2},
    evaluation(3, 3.5, averaged_loss=3.0),
    evaluation(4, 3.0),
]


def test_a_rewind_takes_evaluations_back() -> None:
    assert held_out_losses(RECORDS) == {1: 5.0, 2: 3.0, 3: 3.5, 4: 3.0}
    assert held_out_losses(RECORDS, "averaged") == {1: 5.5, 2: 4.0, 3: 3.0}


@pytest.mark.parametrize(
    ("present", "best"),
    [
        ([1, 2, 3, 4, 5], {"last": 2, "averaged": 3}),
        ([1, 3], {"last": 3, "averaged": 3}),
        ([4], {"last": 4}),
        ([5], {}),
        ([], {}),
    ],
)
def test_the_best_is_the_lowest_of_those_that_are_there(present: list[int], best: dict[str, int]) -> None:
    assert best_steps(RECORDS, present) == best


@pytest.mark.parametrize(
    ("losses", "turned_at"),
    [
        ([], []),
        ([3.0, 2.0, 2.1, 2.1], []),
        ([3.0, 2.0, 2.1, 2.1, 2.1], [5]),
        ([3.0, 2.0, 2.1, 2.1, 2.1, 2.2, 2.3], [5]),  # the same minimum is reported once
        ([2.0, 2.01, 2.01, 2.015, 2.019], []),  # within the margin
        ([2.0, 2.1, 2.01, 2.1, 2.1, 2.1], [6]),  # a good one in between breaks the row
        ([2.0, 2.1, 2.1, 2.1, 1.9, 2.0, 2.0, 2.0], [4, 8]),  # a lower one begins anew
    ],
)
def test_when_it_has_turned(losses: list[float], turned_at: list[int]) -> None:
    assert [n for n in range(len(losses) + 1) if has_turned(losses[:n])] == turned_at
