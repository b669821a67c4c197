"""Sampling parameters, checked without PyTorch; generate.py applies them to the logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from resmol.errors import UsageError

SMALLEST = 1e-5  # a logit of 1e3 divided by it twice is still far below float32's maximum
LARGEST_PENALTY = 1e5  # written out, since 1 / SMALLEST rounds to less
LARGEST_SEED = 2**64 - 1  # the range of PyTorch's generator


@dataclass(frozen=True)
class SamplingParams:
    """How to sample the next token.

    Attributes:
        max_new_tokens: The most tokens to generate.
        temperature: Divides the logits; 0 is greedy and takes the most probable token.
        top_k: Keep the k most probable tokens; 0 keeps all.
        top_p: Keep the most probable tokens whose probabilities add up to p (Holtzman et al. 2020); 1 keeps all.
        seed: Seed of the call's own random generator; the same seed gives the same text.
        repetition_penalty: Divides positive and multiplies negative logits of all tokens seen so far, including the
            prompt's (Keskar et al. 2019); 1 is off.

    Raises:
        UsageError: On creation: values are out of range; all of them are named.
    """

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.95
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        problems = [
            _whole_problem("max_new_tokens", self.max_new_tokens, 1, "it must be at least 1"),
            _number_problem("temperature", self.temperature, lambda t: t == 0 or t >= SMALLEST,
                            f"it must be 0 (greedy), or a number from {SMALLEST} on"),
            _whole_problem("top_k", self.top_k, 0, "it must be 0 (off) or more"),
            _number_problem("top_p", self.top_p, lambda p: 0 < p <= 1, "it must lie in (0, 1]"),
            _whole_problem("seed", self.seed, 0, "it must lie in [0, 2^64)", LARGEST_SEED),
            _number_problem("repetition_penalty", self.repetition_penalty, lambda r: SMALLEST <= r <= LARGEST_PENALTY,
                            f"it must lie in [{SMALLEST}, {LARGEST_PENALTY:g}]; 1 is off"),
        ]  # fmt: skip
        if found := [problem for problem in problems if problem]:
            raise UsageError("; ".join(found), fix="correct the sampling options")


def _whole_problem(name: str, value: Any, low: int, rule: str, high: int | None = None) -> str:
    whole = not isinstance(value, bool) and isinstance(value, Integral)
    fine = whole and low <= int(value) and (high is None or int(value) <= high)
    return "" if fine else f"{name} is {value!r}; {rule}"


def _number_problem(name: str, value: Any, allowed: Callable[[float], bool], rule: str) -> str:
    try:
        number = float(value) if not isinstance(value, bool) and isinstance(value, Real) else math.nan
    except OverflowError:  # an integer that is larger than every float
        number = math.inf
    fine = math.isfinite(number) and allowed(number)
    return "" if fine else f"{name} is {value!r}; {rule}"
