"""The learning rate against closed forms, against transformers' schedulers, and under a changed stop step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_wsd_schedule

from resmol.config.load import load_preset
from resmol.config.run_config import ScheduleConfig
from resmol.train.lr_schedule import end_of_decay, lr_at

PEAK = 3e-3
WSD = ScheduleConfig(kind="wsd", warmup_steps=2000, decay_start=1_600_000, decay_steps=400_000)
COSINE = ScheduleConfig(kind="cosine", warmup_steps=100, horizon=1100, final_fraction=0.1)
CONSTANT = ScheduleConfig(kind="constant", warmup_steps=10)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, PEAK / 2000),
        (2, PEAK * 2 / 2000),
        (500, PEAK / 4),
        (1999, PEAK * 1999 / 2000),
        (2000, PEAK),
        (2001, PEAK),
        (1_600_000, PEAK),
        (1_600_001, PEAK * (1 - 1 / 400_000)),
        (1_700_000, PEAK * 3 / 4),
        (1_999_999, PEAK / 400_000),
        (2_000_000, 0.0),
        (2_000_050, 0.0),
    ],
)
def test_the_published_recipe(step: int, expected: float) -> None:
    assert lr_at(step, WSD, PEAK) == pytest.approx(expected, rel=1e-9, abs=1e-18)


def test_the_pretraining_preset_is_the_published_recipe() -> None:
    config = load_preset("smollm2-135m-pretraining")
    assert config.schedule == WSD
    assert config.optimizer.lr == PEAK


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 0.01),
        (50, 0.5),
        (100, 1.0),
        (350, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),
        (600, 0.55),
        (850, 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2),
        (1100, 0.1),
        (1101, 0.1),
        (2000, 0.1),
        (10_000, 0.1),
    ],
)
def test_cosine(step: int, expected: float) -> None:
    assert lr_at(step, COSINE, 1.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(1, 0.1), (9, 0.9), (10, 1.0), (11, 1.0), (5050, 1.0)])
def test_constant(step: int, expected: float) -> None:
    assert lr_at(step, CONSTANT, 1.0) == pytest.approx(expected)


def test_without_a_planned_decay_the_stable_phase_goes_on() -> None:
    schedule = ScheduleConfig(warmup_steps=100)
    assert {lr_at(step, schedule, PEAK) for step in range(100, 5051)} == {PEAK}


def test_without_a_warm_up_the_first_step_has_the_peak() -> None:
    assert lr_at(1, ScheduleConfig(warmup_steps=0), PEAK) == PEAK


def multiplier(
    make: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LambdaLR],
) -> Callable[[int], float]:
    """Return the function of the step that a scheduler of the reference library multiplies with."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return make(optimizer).lr_lambdas[0]  # type: ignore[return-value]


@pytest.mark.parametrize("shape", ["linear", "1-sqrt"])
def test_wsd_equals_the_reference(shape: str) -> None:
    schedule = ScheduleConfig(warmup_steps=30, decay_start=200, decay_steps=50, decay_shape=shape)
    reference = multiplier(
        lambda optimizer: get_wsd_schedule(
            optimizer, 30, 50, num_stable_steps=170, warmup_type="linear", decay_type=shape
        )
    )
    for step in range(1, 300):
        assert lr_at(step, schedule, 1.0) == pytest.approx(reference(step), rel=1e-12, abs=1e-15)


def test_cosine_equals_the_reference_up_to_its_horizon() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=30, horizon=400)
    reference = multiplier(lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 30, 400))
    for step in range(1, 401):
        assert lr_at(step, schedule, 1.0) == pytest.approx(reference(step), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_the_end_of_a_decay_is_the_first_step_without_a_learning_rate(kind: str, final: float) -> None:
    schedule = ScheduleConfig(
        kind=kind, warmup_steps=5, decay_start=20, decay_steps=10, horizon=40, final_fraction=final
    )
    idle = [step for step in range(1, 60) if lr_at(step, schedule, PEAK) == 0.0]
    assert end_of_decay(schedule) == (idle[0] if idle else None)
    assert end_of_decay(ScheduleConfig(warmup_steps=5)) is None


@pytest.mark.parametrize("schedule", [COSINE, CONSTANT, ScheduleConfig(warmup_steps=9, decay_start=40, decay_steps=60)])
def test_no_step_jumps(schedule: ScheduleConfig) -> None:
    rates = [lr_at(step, schedule, 1.0) for step in range(1, 1300)]
    steepest = max(1 / schedule.warmup_steps, 1 / 60)
    assert max(abs(after - before) for before, after in itertools.pairwise(rates)) <= steepest + 1e-12


@pytest.mark.parametrize("preset", ["nano", "smollm2-135m", "smollm2-135m-cpu", "smollm2-135m-pretraining"])
def test_the_stop_step_does_not_bend_the_curve(preset: str) -> None:
    """Guards against a horizon tied to ``--steps``: going on from 5000 to 5050 would make the rate jump."""
    short, long = load_preset(preset, ["train.steps=5000"]), load_preset(preset, ["train.steps=5050"])
    for step in (1, 100, 499, 2000, 4999, 5000):
        assert lr_at(step, short.schedule, short.optimizer.lr) == lr_at(step, long.schedule, long.optimizer.lr)


@pytest.mark.parametrize("step", [0, -1])
def test_a_step_before_the_first_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match="count from 1"):
        lr_at(step, CONSTANT, PEAK)


@given(
    step=st.integers(1, 10**7),
    peak=st.floats(1e-8, 1.0),
    final=st.floats(0.0, 1.0),
    warmup=st.integers(0, 1000),
    length=st.integers(1, 1000),
)
def test_the_rate_stays_between_zero_and_the_peak(
    step: int, peak: float, final: float, warmup: int, length: int
) -> None:
    for schedule in (
        ScheduleConfig(warmup_steps=warmup, decay_start=max(1, warmup), decay_steps=length, final_fraction=final),
        ScheduleConfig(kind="cosine", warmup_steps=warmup, horizon=warmup + length, final_fraction=final),
    ):
        rate = lr_at(step, schedule, peak)
        assert 0.0 <= rate <= peak * (1 + 1e-12)
        if step > warmup + length + 1:
            assert rate == pytest.approx(peak * final, rel=1e-9, abs=4e-16 * peak)
