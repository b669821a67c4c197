"""The learning rate of a Trainer's history against the schedules of transformers, whose parameters are inferred.

Where a value is not given, it is found: the planned steps from the states, the base rate from the first logged steps,
the warm-up from where the rate stops rising. The formulas are those of ``transformers.optimization``. Newer versions of
the Trainer log the rate that a step used, older ones that of the step after it; both are tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from resmol.audit.foreign.trainer_files import ForeignRun
from resmol.checks import Check
from resmol.errors import UsageError
from resmol.system.wording import counted

KINDS = ("linear", "cosine", "constant", "constant_with_warmup")
ARGUMENTS = ("lr_scheduler_type", "learning_rate", "warmup_steps", "warmup_ratio", "max_steps")
TOLERANCE = 1e-6  # relative: rates are logged as JSON, whole; a schedule in another order of operations rounds anew
MOST_POINTS = 2000  # that a fit looks at
MOST_SKIPPED = 200  # steps that float16 may have skipped
MOST_SKIPPING = 40  # schedules that are tried with skipped steps
FEW = 4  # too few to tell one schedule from another
Rates = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """A schedule of transformers.

    Attributes:
        kind: One of `KINDS`.
        base: The highest rate.
        warmup: Steps in which it rises from 0.
        horizon: The step at which it is 0 again.
        late: How many steps the schedule is behind the logged step: 0 where the next step's rate is logged, 1 where it
            is the one that the step used, and one more for each step that float16 skipped.
        start: The step at which the schedule began.
    """

    kind: str
    base: float
    warmup: int
    horizon: int
    late: int
    start: int = 0

    def factors(self, steps: Rates) -> Rates:
        """Return the share of the base rate at some logged steps."""
        at = steps - self.start - self.late
        rise = at / max(1, self.warmup) if self.kind != "constant" else np.ones_like(at)
        progress = np.clip((at - self.warmup) / max(1, self.horizon - self.warmup), 0.0, 1.0)
        fall = {"linear": 1.0 - progress, "cosine": 0.5 * (1.0 + np.cos(math.pi * progress))}
        return np.where(at < self.warmup, rise, fall.get(self.kind, np.ones_like(at)))

    def explains(self, steps: Rates, rates: Rates) -> npt.NDArray[np.bool_]:
        """Return which logged rates are those of this schedule."""
        return np.abs(rates - self.base * self.factors(steps)) <= TOLERANCE * self.base

    def lags(self, steps: Rates, rates: Rates) -> int | None:
        """Return by how many steps the schedule falls behind on the way; None where that does not explain the rates.

        In float16 a gradient that overflows skips the optimizer's step and, in accelerate, the schedule's.
        """
        behind = [replace(self, late=self.late + lag).explains(steps, rates) for lag in range(MOST_SKIPPED + 1)]
        lag, before = 0, float(steps[0])
        for number, step in enumerate(steps):
            may = range(lag, min(MOST_SKIPPED, lag + max(3, int((step - before) / 100))) + 1)
            found = next((candidate for candidate in may if behind[candidate][number]), None)
            if found is None:
                return None
            lag, before = found, float(step)
        return lag

    def __str__(self) -> str:
        rise = f", {counted(self.warmup, 'step')} of warm-up" if self.warmup else ""
        return f"{self.base:.6g}{rise}, {self.kind_and_end}"

    @property
    def kind_and_end(self) -> str:
        """How the rate falls, without what the first logged steps have to tell."""
        return self.kind + (f" to 0 at step {self.start + self.horizon}" if self.kind in ("linear", "cosine") else "")


def parse_arguments(given: Sequence[str]) -> dict[str, str]:
    """Return ``NAME=VALUE`` texts as a table (`UsageError` for names that are not `ARGUMENTS`, and for bad values)."""
    table = {}
    for text in given:
        name, _, value = text.partition("=")
        if not (value in KINDS if name == "lr_scheduler_type" else name in ARGUMENTS and _parses(value)):
            raise UsageError(
                f"--trainer-arg {text} is not understood",
                fix=f"give NAME=VALUE with {', '.join(ARGUMENTS)}; the types of schedule are {', '.join(KINDS)}",
            )
        table[name] = value
    return table


def _parses(value: str) -> bool:
    try:
        return math.isfinite(float(value)) and float(value) >= 0
    except ValueError:
        return False


def learning_rate(run: ForeignRun, given: Mapping[str, str]) -> Check:
    """Check that the logged learning rates are those of one schedule, from the first step to the last.

    Args:
        run: The run.
        given: What is known of its training arguments; the rest is inferred.
    """
    name, expected = "learning rate", "one schedule from the first step to the last"
    guards = "a schedule that starts anew, or gets another end, at a resume"
    found = {log.step: log.learning_rate for log in run.last.logs if log.learning_rate is not None}
    steps, rates = np.array(sorted(found), dtype=np.float64), np.array([found[step] for step in sorted(found)])
    if len(steps) < FEW or not np.isfinite(rates).all():
        return Check(name, True, f"not compared: {counted(len(steps), 'finite rate')} logged", expected, guards)
    candidates = list(_candidates(run, steps, rates, given, (1, 0)))
    best = _best(candidates, steps, rates)
    explained = best.explains(steps, rates)
    if explained.all():
        others = {one.warmup for one in candidates if one.kind == best.kind and one.explains(steps, rates).all()}
        what = str(best) if len(others) == 1 else f"{best.kind_and_end}, its warm-up cannot be told"
        return Check(name, True, f"{what}, in {counted(len(steps), 'logged step')}", expected, guards)
    if skipped := _skipping(run, steps, rates, given):
        return Check(name, True, skipped, expected, guards)
    first = int(np.argmin(explained))
    wrong = f"{rates[first]:.6g} at step {steps[first]:.0f} instead of {_rate(best, steps[first]):.6g} ({best})"
    if cause := _cause(run, best, steps[first:], rates[first:]):
        return Check(name, False, f"{wrong}; {cause}", expected, guards)
    known, mostly = "lr_scheduler_type" in given, explained.mean() >= 0.5
    if known or (mostly and explained[first:].any()):
        return Check(name, False, wrong, expected, guards)
    unknown = f"none of {', '.join(KINDS)}"
    what = f"{best} up to step {steps[first - 1]:.0f}, what follows is {unknown}" if mostly else unknown
    return Check(name, True, f"not judged: {what}", expected, guards)


def _skipping(run: ForeignRun, steps: Rates, rates: Rates, given: Mapping[str, str]) -> str:
    """Return in words the schedule that explains the rates if float16 skipped some steps; empty where none does."""
    some = _spread(len(steps))
    found = [one for one in _candidates(run, steps, rates, given, range(6)) if one.explains(steps[:2], rates[:2]).all()]
    found.sort(key=lambda one: -int(one.explains(steps[some], rates[some]).sum()))
    for schedule in found[:MOST_SKIPPING]:
        lag = schedule.lags(steps[some], rates[some])
        if lag is not None:
            behind = schedule.late + lag
            return f"{schedule}, at the end {counted(behind, 'step')} behind, as after steps that float16 skipped"
    return ""


def _spread(points: int) -> npt.NDArray[np.int64]:
    """Return the numbers of at most `MOST_POINTS` points, spread evenly over all."""
    return np.unique(np.linspace(0, points - 1, min(points, MOST_POINTS)).astype(np.int64))


def _rate(schedule: Schedule, step: float) -> float:
    return float(schedule.base * schedule.factors(np.array([step]))[0])


def _best(candidates: Sequence[Schedule], steps: Rates, rates: Rates) -> Schedule:
    """Return the schedule that explains the history longest from its beginning, then most of it."""
    some = _spread(len(steps))

    def merit(schedule: Schedule) -> tuple[int, int]:
        fits = schedule.explains(steps[some], rates[some])
        return (len(fits) if fits.all() else int(np.argmin(fits)), int(fits.sum()))

    return max(candidates, key=merit)


def _candidates(
    run: ForeignRun, steps: Rates, rates: Rates, given: Mapping[str, str], lates: Iterable[int]
) -> Iterator[Schedule]:
    plans = [state.plan["max_steps"] for state in run.states if "max_steps" in state.plan]
    horizons = [int(float(given["max_steps"]))] if "max_steps" in given else [*dict.fromkeys(plans)] or [int(steps[-1])]
    kinds = [given["lr_scheduler_type"]] if "lr_scheduler_type" in given else KINDS
    for kind in kinds:
        for horizon in horizons if kind in ("linear", "cosine") else horizons[:1]:
            for warmup in _warmups(kind, horizon, steps, rates, given):
                for late in lates:
                    shape = Schedule(kind, 1.0, warmup, horizon, late)
                    yield from (replace(shape, base=base) for base in _bases(shape, steps, rates, given))


def _warmups(kind: str, horizon: int, steps: Rates, rates: Rates, given: Mapping[str, str]) -> Sequence[int]:
    if kind == "constant":
        return [0]
    if "warmup_ratio" in given:
        return [math.ceil(float(given["warmup_ratio"]) * horizon)]
    if "warmup_steps" in given:  # below 1 it is a share, as in TrainingArguments
        steps_given = float(given["warmup_steps"])
        return [int(steps_given) if steps_given >= 1 else math.ceil(steps_given * horizon)]
    rising = np.diff(rates) > 0
    top = len(rates) - 1 if rising.all() else int(np.argmin(rising))
    low, high = steps[max(top - 1, 0)] if top else 0, steps[min(top + 1, len(steps) - 1)]
    return [0, *range(max(1, int(low) - 1), int(min(high, low + MOST_POINTS)) + 2)]


def _bases(shape: Schedule, steps: Rates, rates: Rates, given: Mapping[str, str]) -> Sequence[float]:
    if "learning_rate" in given:
        return [float(given["learning_rate"])]
    factors = shape.factors(steps)
    usable = np.flatnonzero((factors > 0) & (rates > 0))[:2]
    return [float(base) for base in np.unique(rates[usable] / factors[usable])] or [float(rates.max()) or 1.0]


def _cause(run: ForeignRun, schedule: Schedule, steps: Rates, rates: Rates) -> str:
    """Return in words which usual mistake explains the rates that the schedule does not; empty where none does."""
    for state in run.states:
        again = replace(schedule, start=state.global_step)
        if state.global_step < steps[0] and again.explains(steps, rates).all():
            return f"the schedule started anew after {state.name} (a resume that did not load scheduler.pt)"
        plan = state.plan.get("max_steps", schedule.horizon)
        if plan != schedule.horizon and replace(schedule, horizon=plan).explains(steps, rates).all():
            return f"from there on it is the schedule of {plan} planned steps, not {schedule.horizon}"
    return ""
