"""The options of a generation, checked before PyTorch is loaded; what they do to the logits is in generate.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from resmol.errors import UsageError

SMALLEST = 1e-5  # a logit of 1e3 divided twice by so little is still far from float32's largest number
LARGEST_PENALTY = 1e5  # the other way round, and not 1 / SMALLEST, which rounds to less
LARGEST_SEED = 2**64 - 1  # what PyTorch's generator takes


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token.

    Attributes:
        max_new_tokens: Stop after so many.
        temperature: Divides the logits; 0 always takes the most probable token.
        top_k: Keep the k most probable tokens; 0 keeps all.
        top_p: Keep the most probable tokens whose probabilities add up to p (Holtzman et al. 2020); 1 keeps all.
        seed: The same seed gives the same text; the generator is this call's own, training's is not touched.
        repetition_penalty: Divides positive and multiplies negative logits of all tokens that were seen, those of
            the prompt included (Keskar et al. 2019); 1 is off.

    Raises:
        UsageError: On creation, with one sentence for every value that makes no sense.
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
