"""The options of a generation: what makes no sense is refused with the option and its value."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest

from resmol.errors import UsageError
from resmol.inference.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-1.0, math.nan, math.inf, -math.inf, 1e-9, "0.8", None, True)),
        *(("top_p", value) for value in (0.0, -0.1, 1.01, math.nan, math.inf, "1", False)),
        *(("top_k", value) for value in (-1, 2.5, math.nan, "50", None, True)),
        *(("max_new_tokens", value) for value in (0, -3, 1.5, math.inf, "64", True)),
        *(("seed", value) for value in (-1, 2**64, 0.5, math.nan, "0")),
        *(("repetition_penalty", value) for value in (0.0, -1.2, math.nan, math.inf, 1e9, "1.1", True)),
    ],
)
def test_senseless_options(name: str, value: Any) -> None:
    options = object.__new__(SamplingParams)  # the shape checker of the tests would refuse wrong types before we do
    for field, default in (asdict(SamplingParams()) | {name: value}).items():
        object.__setattr__(options, field, default)
    with pytest.raises(UsageError, match=rf"^{name} is .*; it must") as caught:
        options.__post_init__()
    assert repr(value) in caught.value.what


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(UsageError, match=r"temperature is nan.*top_k is -1.*top_p is 0"):
        SamplingParams(temperature=math.nan, top_k=-1, top_p=0.0)


def test_the_borders_are_allowed() -> None:
    SamplingParams(1, 0.0, 0, 1.0, 2**64 - 1, 1.0)
    SamplingParams(temperature=1e-5, top_p=1e-300, repetition_penalty=1e5)
