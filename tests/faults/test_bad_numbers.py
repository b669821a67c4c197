"""Rows D1 and D2: numbers that are none, and losses that jump."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import Campaign
from trials import Forks, Oracle, Setting, error_of, step_bits, train_run

from resmol.run.directory import RunDir
from resmol.run.ledger import read_ledger, select
from resmol.train import step as train


def train_with_a_bad_gradient(run: Path, setting: Setting, step: int, times: int, bad: float, place: int) -> int:
    """Train; the gradients of one step get one bad number, the first ``times`` times that it is computed."""
    genuine, left = train.accumulate_gradients, [times]
    calls = [0]

    def spoiled(model: Any, *rest: Any) -> torch.Tensor:
        total = genuine(model, *rest)
        calls[0] += 1
        if calls[0] >= step and left[0]:
            left[0] -= 1
            parameters = list(model.parameters())
            gradient = parameters[place % len(parameters)].grad
            gradient.view(-1)[place % gradient.numel()] = bad
        return total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "accumulate_gradients", spoiled)
        return train_run(run, setting)


def test_d1_a_bad_number(campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path) -> None:
    """Once: the step is computed again, as if nothing had been. Twice: nothing is updated, and the run stops."""
    count, draw, problems = campaign.count(2, 20), campaign.draw("D1"), []
    for trial in range(count):
        run, step, twice = tmp_path / f"run-{trial}", draw.randint(2, 59), trial % 2
        bad = draw.choice([float("nan"), float("inf"), -float("inf")])
        code = forks.run(train_with_a_bad_gradient, run, setting, step, 1 + twice, bad, draw.randrange(10**6))
        if code != (70 if twice else 0):
            problems.append(f"exit code {code} at step {step}")
        if twice and ("windows [" not in error_of(run) or max(step_bits(run), default=0) != step - 1):
            problems.append(f"step {step}: the message or the record is wrong")
        if twice:
            code = forks.run(train_run, run, setting)
        problems += oracle.differences(run)[:1] if code == 0 else [f"exit code {code} afterwards"]
    campaign.record(
        "D1", "NaN or infinity in a gradient, once or twice", "computed again, or exit 70 with nothing updated",
        problems, count,
    )  # fmt: skip


def train_with_a_spike(run: Path, setting: Setting, step: int, stop: int) -> int:
    """Train to ``stop``; the recorded loss of one step is a thousand times what it is."""
    genuine = train.train_step

    def jumping(state: Any, *rest: Any) -> train.StepResult:
        result = genuine(state, *rest)
        return dataclasses.replace(result, loss=result.loss * 1000) if state.step == step else result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", jumping)
        return train_run(run, setting, f"train.steps={stop}")


def test_d2_a_loss_spike(campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path) -> None:
    """Flagged, and flagged alike with a resume in between."""
    count, draw, problems = campaign.count(2, 20), campaign.draw("D2"), []
    for trial in range(count):
        step = draw.randint(17, 58)
        straight, resumed = tmp_path / f"straight-{trial}", tmp_path / f"resumed-{trial}"
        stops = (step - draw.randint(1, 10), step, step + 1, 60)
        codes = [forks.run(train_with_a_spike, straight, setting, step, 60)]
        codes += [forks.run(train_with_a_spike, resumed, setting, step, stop) for stop in stops]
        if any(codes):
            problems.append(f"exit codes {codes}")
        elif not _spikes(straight) == _spikes(resumed) == [step]:
            problems.append(f"step {step}: {_spikes(straight)} and {_spikes(resumed)}")
    campaign.record(
        "D2", "the loss of one step a thousandfold", "flagged, alike with resumes in between", problems, count
    )


def _spikes(run: Path) -> list[int]:
    warned = select(read_ledger(RunDir(run).ledger).records, "warn")
    return [record["step"] for record in warned if record["what"] == "loss spike"]
