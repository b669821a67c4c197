"""A check that was not made is not a check that passed."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
from rich.console import Console

from resmol.checks import Check, all_passed, largest
from resmol.cli.terminal import check_table

GOOD = Check("parameters", True, "134,515,008", "134,515,008", guards="an untied output layer", evidence="verify.json")
BAD = dataclasses.replace(GOOD, passed=False)


@pytest.mark.parametrize(
    ("checks", "verdict"),
    [([], False), ([GOOD], True), ([GOOD, GOOD], True), ([GOOD, BAD], False), ([BAD], False)],
)
def test_all_passed(checks: list[Check], verdict: bool) -> None:
    assert all_passed(checks) is verdict


@pytest.mark.parametrize("values", [[math.nan, 1.0], [0.0, math.nan], [0.0, math.nan, 2.0], [math.inf, math.nan]])
def test_nan_is_larger_than_every_tolerance(values: list[float]) -> None:
    assert math.isnan(largest(values))
    assert not largest(values) <= math.inf


def test_the_largest_number_is_the_largest() -> None:
    assert largest(iter([-2.0, -1.0, -3.0])) == -1.0


def test_a_check_is_a_json_object_with_every_field() -> None:
    assert Check(**json.loads(json.dumps(GOOD.to_dict()))) == GOOD


def test_a_check_cannot_be_changed_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BAD.passed = True  # type: ignore[misc]


def test_a_path_in_the_title_is_not_markup() -> None:
    shown = io.StringIO()
    Console(width=200, file=shown).print(check_table("export to out/[bold]x[/bold]", [GOOD], explain=False))
    assert "out/[bold]x[/bold]" in shown.getvalue()
