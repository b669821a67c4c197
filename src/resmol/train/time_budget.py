"""Train for a given time: measure this run's own steps, plan the decay to end in time, and go on with that plan.

The plan is a number of steps, and a change of the configuration like any other: the ledger records it as a drift,
config.toml holds it, and no step before the decay depends on it. The clock is not read again, so a resumed run keeps
its horizon, and on a slower machine it takes longer.
"""

from __future__ import annotations

import logging
import math
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from resmol.config.load import parse_overrides
from resmol.config.run_config import RunConfig, ScheduleConfig
from resmol.errors import UsageError
from resmol.run.config_history import recorded_config
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, effective_steps, read_ledger
from resmol.system.launcher import this_launch
from resmol.train.request import first_request
from resmol.train.start import train_model
from resmol.train.step import TrainState

logger = logging.getLogger(__name__)

MEASURED_STEPS = 20  # of the run itself: they are trained, and stay
WARMING_STEPS = 5  # of those: the first ones compile, allocate and read
DECAY_SHARE = 0.2  # of all steps, as in SmolLM2's recipe, where the configuration plans no decay of its own
PLANNED = ("schedule.planned_seconds", "schedule.decay_start", "schedule.decay_steps")
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def parse_duration(text: str) -> int:
    """Return the seconds of a text such as 30m, 2h, 1h30m or 90s (`UsageError` for another one)."""
    match = _DURATION.fullmatch(text.strip().lower())
    hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if total < 1:
        raise UsageError(f"{text!r} is not a time", fix="give hours, minutes and seconds, such as 30m, 2h or 1h30m")
    return total


def describe_duration(seconds: int) -> str:
    """Return a time as `parse_duration` reads it."""
    hours, minutes, rest = seconds // 3600, seconds % 3600 // 60, seconds % 60
    return "".join(f"{n}{unit}" for n, unit in ((hours, "h"), (minutes, "m"), (rest, "s")) if n)


def train_for(
    seconds: int,
    config: RunConfig | None,
    run: str | Path,
    *,
    overrides: Sequence[str] = (),
    accept_drift: Sequence[str] = (),
    **options: Any,
) -> TrainState:
    """Start a run, or go on with one, for about so long, with the decay of the learning rate planned for that time.

    The same call goes on with an interrupted one, to the horizon that was planned.

    Args:
        seconds: The time, data preparation and start included.
        config: What `train_model` takes.
        run: The run directory.
        overrides: ``section.key=value``, laid over the configuration.
        accept_drift: What `train_model` takes.
        options: Its other arguments.

    Raises:
        UsageError: Something else says when to stop or to decay, the run has another horizon, or the time is too short.
        ResmolError: What `train_model` raises.
    """
    started = time.monotonic()
    directory = RunDir(Path(run))
    _check_request(overrides, options)
    before = _recorded(directory)
    if before is not None and before.schedule.planned_seconds:
        plan = _kept_plan(before.schedule, seconds, directory)
    else:
        asked = first_request(directory, config or before, parse_overrides(overrides), None).schedule
        _check_kind(asked if before is None else before.schedule, directory, begun=before is not None)
        first = _last_step(directory)
        without_decay = [f"train.steps={first + MEASURED_STEPS}", *(f"{key}=0" for key in PLANNED)]
        train_model(config, run, overrides=[*overrides, *without_decay], accept_drift=accept_drift, **options)
        cost = step_cost(read_ledger(directory.ledger).records, directory.load_config(), first + WARMING_STEPS)
        left = seconds - (time.monotonic() - started)
        plan = make_plan(asked, seconds, left, first + MEASURED_STEPS, cost)
    changes = [*(f"{key}={value}" for key, value in plan.fields().items()), f"train.steps={plan.steps}"]
    return train_model(config, run, overrides=[*overrides, *changes], accept_drift=[*accept_drift, *PLANNED], **options)


@dataclass(frozen=True)
class Plan:
    """A horizon.

    Attributes:
        seconds: The time that it was planned for.
        steps: The last step, with which the decay ends.
        decay_steps: Steps of the decay.
    """

    seconds: int
    steps: int
    decay_steps: int

    def fields(self) -> dict[str, int]:
        """Return the fields of the configuration that hold it, besides ``train.steps``."""
        return dict(zip(PLANNED, (self.seconds, self.steps - self.decay_steps, self.decay_steps), strict=True))


def make_plan(schedule: ScheduleConfig, seconds: int, left: float, done: int, cost: float) -> Plan:
    """Return the horizon for the time that is left; log it.

    Args:
        schedule: What was asked for: its decay gives the share of the steps that decay.
        seconds: The time that was asked for.
        left: What is left of it.
        done: Steps that are done.
        cost: Seconds of a step, with its part of evaluations, samples and checkpoints.

    Raises:
        UsageError: There is no time for the warm-up and a decay.
    """
    asked = schedule.decay_start + schedule.decay_steps
    share = schedule.decay_steps / asked if asked else DECAY_SHARE
    steps = done + max(0, int(left / cost))
    plan = Plan(seconds, steps, max(1, round(share * steps)))
    earliest = max(schedule.warmup_steps, done)
    if steps - plan.decay_steps < earliest:
        least = seconds - left + cost * (earliest / (1 - share) + 1 - done)
        minutes = f"{math.ceil(1.1 * least / 60)}m"
        raise UsageError(
            f"{describe_duration(seconds)} are about {steps} steps of {cost:.3g} s here, and the warm-up and what is "
            f"done take {earliest} before the decay",
            fix=f"give --time {minutes} or more, or begin a new run with a shorter --warmup-steps",
        )
    logger.info(
        f"time: a step takes about {cost:.3g} s with its part of evaluation and saving; {describe_duration(seconds)} "
        f"end at about step {steps:,}, with a decay over the last {plan.decay_steps:,}"
    )
    return plan


def step_cost(records: list[Record], config: RunConfig, after: int) -> float:
    """Return the seconds of a step, with its part of what happens every so many steps.

    Args:
        records: The ledger; its last steps were measured, and the last one was followed by an evaluation, a sample and
            a checkpoint, as far as they are on.
        config: How often they happen.
        after: Steps after this one count.
    """
    steps = effective_steps(records)
    cost = statistics.median(float(record["seconds"]) for step, record in steps.items() if step > after)
    extras = (("eval", config.evaluation), ("sample", config.sampling), ("save", config.checkpoint))
    for kind, section in extras:
        if section.every:
            cost += _seconds_of(records, kind, max(steps)) / section.every
    return cost


def _seconds_of(records: list[Record], kind: str, step: int) -> float:
    """Return how long it took what a record states: it was written afterwards, and the one before it beforehand."""
    for before, record in zip(records[-2::-1], records[:0:-1], strict=True):
        if (record["kind"], record.get("step")) == (kind, step):
            end, start = (datetime.fromisoformat(str(one["time"])) for one in (record, before))
            return float((end - start).total_seconds())
    return 0.0


def _check_request(overrides: Sequence[str], options: dict[str, Any]) -> None:
    given = [key for key in (*PLANNED, "train.steps") if key in parse_overrides(overrides)]
    if options.get("epochs") is not None:
        given.append("--epochs")
    if given:
        named = ", ".join("--steps (train.steps)" if key == "train.steps" else key for key in given)
        raise UsageError(f"--time plans the last step and the decay, and {named} says it too", fix="leave one out")
    if this_launch().world_size > 1:
        raise UsageError("--time measures one process, and there are several", fix="give --steps instead")


def _recorded(run: RunDir) -> RunConfig | None:
    """Return the configuration of a run that has begun, as its ledger recorded it; None for a new one."""
    if not run.has_begun():
        return None
    return recorded_config(run.ledger, run.load_config() if run.exists() else None)


def _last_step(run: RunDir) -> int:
    return max(effective_steps(read_ledger(run.ledger).records), default=0) if run.has_begun() else 0


def _kept_plan(schedule: ScheduleConfig, seconds: int, run: RunDir) -> Plan:
    """Return the plan that a run was given by the same time (`UsageError` for another one)."""
    plan = Plan(schedule.planned_seconds, schedule.decay_start + schedule.decay_steps, schedule.decay_steps)
    if plan.seconds != seconds:
        planned = describe_duration(plan.seconds)
        raise UsageError(
            f"{run.path} was planned for {planned}: it ends at step {plan.steps}",
            fix=f"give --time {planned}, or leave --time, --preset and --config out to go on with it; another time "
            "needs a new run directory",
        )
    return plan


def _check_kind(schedule: ScheduleConfig, run: RunDir, *, begun: bool) -> None:
    """Refuse a schedule whose horizon cannot be planned, and a run that has one (`UsageError`)."""
    if schedule.kind != "wsd":
        raise UsageError(
            f"schedule.kind is {schedule.kind}; --time plans the decay of wsd",
            fix="set schedule.kind=wsd in a new run, or give --steps",
        )
    if begun and schedule.decay_steps:
        end = schedule.decay_start + schedule.decay_steps
        raise UsageError(
            f"{run.path} has a horizon: its decay ends at step {end}",
            fix=f"leave --time out and give --steps {end}, or name a new run directory",
        )
