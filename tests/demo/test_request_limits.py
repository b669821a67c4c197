"""What a request may hold: every value that the page cannot send is refused in one sentence."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmol.demo.request_limits import FIELDS, Limits, parse, problems
from resmol.errors import UsageError

LIMITS = Limits()
GOOD: list[Any] = ["a text", 64, 0.8, 0.95, 50, 0, False, 1.0]


def with_value(field: str, value: object) -> list[Any]:
    return [value if name == field else given for name, given in zip(FIELDS, GOOD, strict=True)]


def test_what_the_page_sends_is_fine() -> None:
    request = parse(GOOD, LIMITS)
    assert (request.prompt, request.sampling.max_new_tokens, request.sampling.top_p) == ("a text", 64, 0.95)
    assert parse(["", 512, 0, 1, 0, 2**32 - 1, False, 1], LIMITS).sampling.temperature == 0
    assert parse(with_value("max_new_tokens", 64.0), LIMITS).sampling.max_new_tokens == 64


def test_a_random_seed_is_another_each_time() -> None:
    values = [with_value("random_seed", True)] * 20
    assert len({parse(given, LIMITS).sampling.seed for given in values}) > 10
    assert not any(problems([value if value != 0 else None for value in values[0]], LIMITS)), "the field may be empty"
    assert parse(with_value("seed", 7), LIMITS).sampling.seed == 7
    assert parse(with_value("repetition_penalty", 1.5), LIMITS).sampling.repetition_penalty == 1.5


@pytest.mark.parametrize("field", FIELDS[1:])
@pytest.mark.parametrize("value", [-1, 1e309, -math.inf, math.nan, "abc", "5", None, [], {}, True, 10**400, -(10**400)],
                         ids=lambda value: repr(value)[:12])  # fmt: skip
def test_bad_numbers(field: str, value: Any) -> None:
    if (field, value) == ("random_seed", True):
        return
    found = problems(with_value(field, value), LIMITS)
    assert [bool(problem) for problem in found] == [name == field for name in FIELDS]
    with pytest.raises(UsageError, match=field.replace("max_", "").replace("_", ".")):
        parse(with_value(field, value), LIMITS)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_new_tokens", 513), ("max_new_tokens", 0), ("max_new_tokens", 1.5), ("temperature", 2.01), ("top_p", 0),
     ("temperature", 1e-300), ("top_p", 1.01), ("top_k", 201), ("seed", 2**32), ("seed", 0.5),
     ("repetition_penalty", 0.99), ("repetition_penalty", 2.01), ("random_seed", 0)],
)  # fmt: skip
def test_just_outside(field: str, value: float) -> None:
    assert sum(map(bool, problems(with_value(field, value), LIMITS))) == 1


@pytest.mark.parametrize("prompt", [None, 7, ["a"], "x" * 4001, "\ud800", "a\udfffb"])
def test_bad_prompts(prompt: Any) -> None:
    assert problems(with_value("prompt", prompt), LIMITS)[0]


@pytest.mark.parametrize("prompt", ["", "x" * 4000, "\0", "\u202eabc", "\U0001f642" * 4000, "\n" * 4000])
def test_odd_prompts_are_allowed(prompt: str) -> None:
    assert not any(problems(with_value("prompt", prompt), LIMITS))
    sent = json.dumps({"data": with_value("prompt", prompt), "fn_index": 0, "session_hash": "0123456789"})
    assert len(sent) < LIMITS.body_bytes, "a prompt that is allowed must get through"


@given(st.lists(st.one_of(st.none(), st.text(), st.floats(), st.integers(), st.booleans()), max_size=10))
def test_anything_is_taken_or_refused_with_a_sentence(values: list[Any]) -> None:
    try:
        parse(values, LIMITS)
    except UsageError as error:
        assert error.what  # noqa: PT017 - either outcome is right
