"""Limits of a request to the demo, checked by our own code: the bounds of Gradio's fields bind the browser only.

(Gradio compares with ``<`` and ``>``, which NaN passes, and does not look at a text's length at all.)
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from resmol.errors import UsageError
from resmol.inference.sampling_params import SamplingParams

# In the order of the page.
FIELDS = (
    "prompt", "max_new_tokens", "temperature", "top_p", "top_k", "seed", "random_seed", "repetition_penalty",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """Limits for one visitor, and for all of them together.

    Attributes:
        prompt_chars: Length of a prompt, in characters; its length in tokens is bounded by the model's context.
        new_tokens: Tokens of one text.
        temperature: The highest.
        top_k: The highest.
        seed: The highest.
        repetition_penalty: The highest.
        seconds: Computing time of one text.
        body_bytes: Size of a request's body. Each character of a prompt may arrive as two escapes of six bytes.
        body_seconds: Time that a body may take to arrive.
        waiting: Requests that wait for their turn; more are refused at once. One is computed at a time.
        connections: Open connections; more are refused at once.
        listener_seconds: A request without a listener for so long is dropped.
    """

    prompt_chars: int = 4_000
    new_tokens: int = 512
    temperature: float = 2.0
    top_k: int = 200
    seed: int = 2**32 - 1
    repetition_penalty: float = 2.0
    seconds: float = 120.0
    body_bytes: int = 64 << 10
    body_seconds: float = 10.0
    waiting: int = 16
    connections: int = 256
    listener_seconds: float = 5.0


@dataclass(frozen=True)
class Request:
    """A request that keeps to the limits."""

    prompt: str
    sampling: SamplingParams


def problems(values: Sequence[object], limits: Limits) -> list[str]:
    """Return one sentence for each of the `FIELDS`, empty where its value is fine."""
    prompt, new_tokens, temperature, top_p, top_k, seed, random_seed, penalty = values
    return [
        _prompt_problem(prompt, limits.prompt_chars),
        _number_problem("new tokens", new_tokens, 1, limits.new_tokens, whole=True),
        _temperature_problem(temperature, limits.temperature),
        _number_problem("top-p", top_p, 0.01, 1),
        _number_problem("top-k", top_k, 0, limits.top_k, whole=True),
        "" if random_seed is True else _number_problem("seed", seed, 0, limits.seed, whole=True),
        "" if isinstance(random_seed, bool) else "random seed must be yes or no",
        _number_problem("repetition penalty", penalty, 1, limits.repetition_penalty),
    ]  # fmt: skip


def parse(values: Sequence[object], limits: Limits) -> Request:
    """Return the request of these values, in the order of `FIELDS`; its seed is drawn where that is asked for.

    Raises:
        UsageError: There are more or fewer of them, or one is outside the limits.
    """
    if len(values) != len(FIELDS):
        raise UsageError(f"a request has {len(FIELDS)} values, this one {len(values)}", fix="reload the page")
    if found := [problem for problem in problems(values, limits) if problem]:
        raise UsageError("; ".join(found), fix="correct the values")
    prompt, new_tokens, temperature, top_p, top_k, seed, random_seed, penalty = values
    assert isinstance(prompt, str)
    sampling = SamplingParams(
        max_new_tokens=_whole(new_tokens), temperature=_number(temperature), top_k=_whole(top_k), top_p=_number(top_p),
        seed=secrets.randbelow(limits.seed + 1) if random_seed else _whole(seed), repetition_penalty=_number(penalty),
    )  # fmt: skip
    return Request(prompt, sampling)


def _prompt_problem(prompt: object, limit: int) -> str:
    if not isinstance(prompt, str):
        return "the prompt must be text"
    if len(prompt) > limit:
        return f"the prompt has {len(prompt):,} characters; at most {limit:,} are allowed"
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        return "the prompt holds half a character (a surrogate without its partner)"
    return ""


def _number_problem(name: str, value: object, low: int | float, high: int | float, *, whole: bool = False) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(_number(value)):
        return f"{name} must be a number"
    if not low <= _number(value) <= high:
        return f"{name} must lie between {low:g} and {high:,}"
    if whole and _number(value) != int(_number(value)):
        return f"{name} must be a whole number"
    return ""


def _temperature_problem(value: object, high: float) -> str:
    """As for any number; close to 0 the division of the logits overflows, and 0 itself does not divide."""
    if problem := _number_problem("temperature", value, 0, high):
        return problem
    return "temperature must be 0, or 0.01 or more" if 0 < _number(value) < 0.01 else ""


def _number(value: object) -> float:
    """Return a value of JSON as a float; an integer that is too large for one is infinite."""
    assert isinstance(value, int | float)
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _whole(value: object) -> int:
    assert isinstance(value, int | float)
    return int(value)
