"""Loss spikes: what counts as one, and that a resume does not change the decision."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
from tiny import TrainTiny

from resmol.errors import CheckFailed
from resmol.run.ledger import read_ledger, select
from resmol.train import step as module
from resmol.train.loss_spikes import HISTORY, MIN_HISTORY, append_loss, is_spike
from resmol.train.step_result import StepResult


def test_a_normal_course_is_no_spike() -> None:
    draw, recent = random.Random(0), ()
    for step in range(2000):
        loss = 3 + 7 * 0.99**step + draw.gauss(0, 0.05)
        assert not is_spike(loss, recent)
        recent = append_loss(loss, recent)
    assert len(recent) == HISTORY


def test_a_jump_is_one_and_few_losses_are_no_opinion() -> None:
    recent = tuple(3 + 0.01 * (n % 7) for n in range(MIN_HISTORY))
    assert is_spike(4.5, recent)
    assert not is_spike(1.0, recent), "falling is no alarm"
    assert not is_spike(4.5, recent[1:])


def test_half_of_the_losses_may_be_spikes() -> None:
    assert is_spike(50.0, (3.0, 3.01, 3.02, 2.99) * 6 + (50.0,) * 20)


@pytest.fixture
def a_bad_batch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the loss of one step a thousand times what it is, whenever that step is executed."""

    def at(step: int) -> None:
        genuine = module.train_step

        def jumping(state: Any, *rest: Any) -> StepResult:
            result = genuine(state, *rest)
            return dataclasses.replace(result, loss=result.loss * 1000) if state.step == step else result

        monkeypatch.setattr(module, "train_step", jumping)

    return at


def spikes(run: Path) -> list[int]:
    warned = select(read_ledger(run / "ledger.jsonl").records, "warn")
    return [record["step"] for record in warned if record["what"] == "loss spike"]


@pytest.mark.parametrize("step", [5, 22, 26])
def test_the_decision_is_the_same_with_and_without_a_resume(
    tmp_path: Path, train_tiny: TrainTiny, a_bad_batch: Any, step: int
) -> None:
    a_bad_batch(step)
    train_tiny(tmp_path / "straight", 30)
    for steps in (step - 1, step, step + 1, 30):
        train_tiny(tmp_path / "resumed", steps)
    assert spikes(tmp_path / "straight") == spikes(tmp_path / "resumed") == ([] if step < MIN_HISTORY else [step])


def test_a_run_that_is_to_stop_stops_and_can_go_on(tmp_path: Path, train_tiny: TrainTiny, a_bad_batch: Any) -> None:
    a_bad_batch(22)
    with pytest.raises(CheckFailed, match="step 22"):
        train_tiny(tmp_path / "run", 30, "train.on_spike=stop")
    assert train_tiny(tmp_path / "run", 30, "train.on_spike=warn").step == 30
