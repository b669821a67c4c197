"""Statistics of paired measurements: is one variant faster than another, or does it learn better?

Each round measures every variant once, so a slow minute of the machine slows all of them, and the ratio within a
round is compared. One variant is measured twice under two names (an A/A control): the interval of that ratio is the
noise of this machine.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5 % quantiles of Student's t by degrees of freedom, from 1; beyond the table the last value is slightly too wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
TOO_NOISY = 0.15  # a control whose interval reaches further than this from 1 allows no verdict


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % confidence interval; 1 is no difference."""

    middle: float
    low: float
    high: float

    @property
    def reach(self) -> float:
        """How far the interval reaches from 1, as a logarithm."""
        return max(abs(math.log(self.low)), abs(math.log(self.high))) if self.low > 0 else math.inf

    def contains(self, value: float) -> bool:
        """Return whether a ratio lies within the interval."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval; of a single value the interval is infinite."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0: at the 5 % level, the mean is not 0."""
        return self.low > 0 or self.high < 0

    def show(self, form: str = ".4f") -> str:
        """Return the mean and, where there is one, the interval."""
        bounds = f" ({self.low:{form}} to {self.high:{form}})" if math.isfinite(self.low) else ""
        return f"{self.mean:{form}}{bounds}"


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of values that are taken as normal, with the interval of Student's t (1908).

    Of differences that were measured in pairs this is the paired t-test.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    half = _T[min(len(values) - 1, len(_T)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def paired_ratio(values: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Return the ratio of two series that were measured in pairs.

    The logarithms of the ratios are taken as normal (Student 1908). The interval of a single pair is infinite.
    """
    logs = mean_interval([math.log(value / base) for value, base in zip(values, baseline, strict=True)])
    return Ratio(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high))


def is_too_noisy(control: Ratio) -> bool:
    """Return whether the interval of the control is too wide, or excludes 1, so that no verdict is possible."""
    return control.reach > TOO_NOISY or not control.contains(1.0)


def verdict(ratio: Ratio, control: Ratio) -> str:
    """Describe what a ratio of speeds shows, given the control.

    A difference counts only if its interval lies beyond the reach of the control's, which is the machine's noise.
    """
    if is_too_noisy(control):
        return "no verdict: the control differs from itself"
    noise = math.exp(control.reach)
    if ratio.low > noise:
        return f"faster by {_percent(ratio.middle)} ({_percent(ratio.low)} to {_percent(ratio.high)})"
    if ratio.high < 1 / noise:
        return f"slower by {_percent(1 / ratio.middle)} ({_percent(1 / ratio.high)} to {_percent(1 / ratio.low)})"
    return "no difference shown"


def interleaved(variants: int, rounds: int, seed: int) -> list[list[int]]:
    """Return the order of each round: every variant once, shuffled, so that none always follows the same other."""
    draw = random.Random(seed)  # noqa: S311 - an order, no secret
    return [draw.sample(range(variants), variants) for _ in range(rounds)]


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):.0f} %"
