"""The learning rate as a pure function of the step.

Nothing is stored and nothing depends on the step at which a run stops, so stopping at 5000 and going on to 5050 cannot
bend the curve. Steps count from 1, the first update.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from resmol.config.run_config import ScheduleConfig


def lr_at(step: int, schedule: ScheduleConfig, peak: float) -> float:
    """Return the learning rate of the update that leads to ``step``.

    Args:
        step: The optimizer step, from 1.
        schedule: Shape and horizon.
        peak: The learning rate after the warm-up.

    Returns:
        ``peak x step / warmup_steps`` during the linear warm-up, then the value of the schedule's shape.
    """
    if step < 1:
        raise ValueError(f"steps count from 1, not {step}")
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    return peak * _SHAPES[schedule.kind](step, schedule)


def first_changed_step(old: ScheduleConfig, new: ScheduleConfig, last: int) -> int | None:
    """Return the first of the steps 1 to ``last`` whose learning rate differs between two schedules, or None."""
    if old == new:
        return None
    return next((step for step in range(1, last + 1) if lr_at(step, old, 1.0) != lr_at(step, new, 1.0)), None)


def end_of_decay(schedule: ScheduleConfig) -> int | None:
    """Return the step from which the learning rate is 0, so that nothing is learned after it; None if there is none."""
    if schedule.final_fraction > 0 or schedule.kind == "constant":
        return None
    return schedule.horizon if schedule.kind == "cosine" else schedule.decay_start + schedule.decay_steps or None


def decay_over(schedule: ScheduleConfig, steps: int) -> tuple[int, int]:
    """Return start and length of the planned decay in a run of ``steps`` steps: the same share of them, and its end."""
    start = round(schedule.decay_start * steps / (schedule.decay_start + schedule.decay_steps))
    start = max(schedule.warmup_steps, start)
    return start, steps - start


def _constant(_step: int, _schedule: ScheduleConfig) -> float:
    return 1.0


def _wsd(step: int, schedule: ScheduleConfig) -> float:
    """Warm-up-stable-decay (Hu et al. 2024, MiniCPM, section 4).

    The decay is linear, as in SmolLM2's recipe, or 1 - sqrt(progress) (Hägele et al. 2024, arXiv 2405.18392).
    """
    if schedule.decay_start == 0 or step <= schedule.decay_start:
        return 1.0
    progress = min(1.0, (step - schedule.decay_start) / schedule.decay_steps)
    fallen = math.sqrt(progress) if schedule.decay_shape == "1-sqrt" else progress
    return 1.0 + fallen * (schedule.final_fraction - 1.0)


def _cosine(step: int, schedule: ScheduleConfig) -> float:
    """Half a cosine from the end of the warm-up to the horizon (Loshchilov & Hutter 2017), flat afterwards."""
    progress = min(1.0, (step - schedule.warmup_steps) / (schedule.horizon - schedule.warmup_steps))
    return schedule.final_fraction + (1.0 - schedule.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))


_SHAPES: dict[str, Callable[[int, ScheduleConfig], float]] = {
    "constant": _constant,
    "wsd": _wsd,
    "cosine": _cosine,
}
