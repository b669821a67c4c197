"""The arithmetic of a comparison, on measurements that are made up."""

from __future__ import annotations

import json
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from resmol.bench.comparison import Comparison, Quantity, Variant
from resmol.errors import CheckFailed

SPEED = Quantity("tokens_per_second", "tokens/s")


def variant(name: str, kind: Any, *values: float) -> Variant:
    left = list(values)
    return Variant(name, kind, lambda: {"tokens_per_second": left.pop(0), "peak_bytes": 3 << 20})


def comparison(*variants: Variant, **options: Any) -> Comparison:
    memory = Quantity("peak_bytes", "MiB", unit=2.0**20)
    return Comparison("a title", SPEED, (memory,), list(variants), {"threads": 2}, **options)


def usual(**options: Any) -> Comparison:
    held = comparison(
        variant("ours", "reference", 200.0, 202.0, 198.0),
        variant("again", "control", 201.0, 201.0, 199.0),
        variant("theirs", "other", 100.0, 101.0, 99.0),
        variant("most", "roofline", 400.0, 404.0, 396.0),
        **options,
    )
    held.run(3, 0)
    return held


def test_ratio_share_and_verdict() -> None:
    held = usual()
    ratio = held.ratio(held.variants[2])
    assert ratio is not None
    assert (ratio.low, ratio.middle, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    assert held.share(held.variants[0]) == pytest.approx([0.5, 0.5, 0.5])
    assert held.verdict(held.variants[2]).startswith("2.00x (2.00 to 2.00): faster by 100 %")
    assert held.verdict(held.variants[1]).startswith("noise: up to ")


def test_of_times_less_is_better() -> None:
    held = usual(more_is_better=False)
    ratio = held.ratio(held.variants[2])
    assert ratio is not None
    assert ratio.middle == pytest.approx(0.5)
    assert held.share(held.variants[2]) == pytest.approx([4.0, 4.0, 4.0])


def test_inverted_each_row_is_compared_with_the_first() -> None:
    held = usual(inverted=True)
    ratio = held.ratio(held.variants[2])
    assert ratio is not None
    assert ratio.middle == pytest.approx(0.5)
    assert held.verdict(held.variants[2]).startswith("0.50x (0.50 to 0.50): slower by 100 %")
    assert "against the first row" in held.markdown()
    slower = usual(inverted=True, more_is_better=False)
    assert slower.ratio(slower.variants[2]).middle == pytest.approx(2.0)  # type: ignore[union-attr]


def test_every_variant_is_measured_once_a_round_in_changing_order(messages: list[str]) -> None:
    seen: list[int] = []

    def noted(number: int) -> Variant:
        return Variant(f"number {number}", "other", lambda: seen.append(number) or {"tokens_per_second": 1.0})

    held = comparison(*map(noted, range(4)))
    held.run(6, 0)
    rounds = [seen[start : start + 4] for start in range(0, 24, 4)]
    assert held.complete
    assert all(sorted(order) == [0, 1, 2, 3] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert "round 6 of 6" in messages[-1]
    assert "about 0 s left" in messages[-1]


def test_table_markdown_and_json_hold_the_same() -> None:
    held, text = usual(), StringIO()
    held.render(Console(file=text, width=200))
    for shown in (text.getvalue(), held.markdown()):
        assert "200 (198 to 202)" in shown
        assert "50 %" in shown
        assert "3 rounds, interleaved" in shown
    stored = json.loads(json.dumps(held.to_dict(), allow_nan=False))
    assert [numbers["tokens_per_second"] for numbers in stored["rows"][2]["measurements"]] == [100.0, 101.0, 99.0]
    assert stored["rows"][2]["ratio"]["middle"] == pytest.approx(2.0)
    assert stored["ratio_is"] == "reference / row"
    assert stored["complete"] is True


def test_one_round_has_no_interval_and_no_infinity() -> None:
    held = comparison(
        variant("ours", "reference", 2.0), variant("again", "control", 2.0), variant("theirs", "other", 1.0)
    )
    held.run(1, 0)
    assert "2.00x (0.00 to any): no verdict" in held.verdict(held.variants[2])
    assert held.to_dict()["rows"][2]["ratio"]["high"] is None
    assert "too noisy" in held.markdown()


def test_a_baseline_that_fails_is_shown_and_not_tried_again() -> None:
    tried: list[int] = []

    def fail() -> dict[str, Any]:
        tried.append(1)
        raise CheckFailed("no compiler", fix="none")

    held = comparison(variant("ours", "reference", 1.0, 1.0), Variant("broken", "other", fail))
    held.run(2, 0)
    assert held.complete
    assert held.rounds == 2
    assert tried == [1]
    assert "failed: no compiler" in held.markdown()


@pytest.mark.parametrize("kind", ["reference", "control", "roofline"])
def test_only_the_others_may_fail(kind: Any) -> None:
    def fail() -> dict[str, Any]:
        raise CheckFailed("broken", fix="none")

    with pytest.raises(CheckFailed, match="broken"):
        comparison(Variant("ours", kind, fail)).run(1, 0)


def test_what_an_interruption_left_is_shown(messages: list[str]) -> None:
    def interrupted() -> dict[str, Any]:
        if len(one.measurements) == 2:
            raise KeyboardInterrupt
        return {"tokens_per_second": 5.0}

    one = Variant("ours", "reference", interrupted)
    held = comparison(one)
    held.run(5, 0)
    assert not held.complete
    assert messages[-1] == "interrupted; the results so far follow"
    assert held.rounds == 2
    assert "2 rounds, interleaved (interrupted)" in held.markdown()
