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


def quiet(_: str) -> None:
    pass


def contender(name: str, kind: Any, *values: float) -> Variant:
    left = list(values)
    return Variant(name, kind, lambda: {"tokens_per_second": left.pop(0), "peak_bytes": 3 << 20})


def contest(*contenders: Variant, more_is_better: bool = True) -> Comparison:
    memory = Quantity("peak_bytes", "MiB", unit=2.0**20)
    return Comparison("a title", SPEED, (memory,), list(contenders), {"threads": 2}, more_is_better)


def usual(**options: Any) -> Comparison:
    held = contest(
        contender("ours", "ours", 200.0, 202.0, 198.0),
        contender("again", "control", 201.0, 201.0, 199.0),
        contender("theirs", "peer", 100.0, 101.0, 99.0),
        contender("most", "limit", 400.0, 404.0, 396.0),
        **options,
    )
    held.run(3, 0, quiet)
    return held


def test_ratio_share_and_verdict() -> None:
    held = usual()
    ratio = held.ratio(held.contenders[2])
    assert ratio is not None
    assert (ratio.low, ratio.middle, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    assert held.share(held.contenders[0]) == pytest.approx([0.5, 0.5, 0.5])
    assert held.verdict(held.contenders[2]).startswith("2.00x (2.00 to 2.00): faster by 100 %")
    assert held.verdict(held.contenders[1]).startswith("noise: up to ")


def test_of_times_less_is_better() -> None:
    held = usual(more_is_better=False)
    ratio = held.ratio(held.contenders[2])
    assert ratio is not None
    assert ratio.middle == pytest.approx(0.5)
    assert held.share(held.contenders[2]) == pytest.approx([4.0, 4.0, 4.0])


def test_table_markdown_and_json_hold_the_same() -> None:
    held, text = usual(), StringIO()
    held.render(Console(file=text, width=200))
    for shown in (text.getvalue(), held.markdown()):
        assert "200 (198 to 202)" in shown
        assert "50 %" in shown
        assert "3 rounds, interleaved" in shown
    stored = json.loads(json.dumps(held.to_dict(), allow_nan=False))
    assert [numbers["tokens_per_second"] for numbers in stored["rows"][2]["measurements"]] == [100.0, 101.0, 99.0]
    assert stored["rows"][2]["resmol_is_faster_by"]["middle"] == pytest.approx(2.0)
    assert stored["complete"] is True


def test_one_round_has_no_interval_and_no_infinity() -> None:
    held = contest(contender("ours", "ours", 2.0), contender("again", "control", 2.0), contender("peer", "peer", 1.0))
    held.run(1, 0, quiet)
    assert "2.00x (0.00 to any): no verdict" in held.verdict(held.contenders[2])
    assert held.to_dict()["rows"][2]["resmol_is_faster_by"]["high"] is None
    assert "too noisy" in held.markdown()


def test_a_peer_that_fails_is_shown_and_not_tried_again() -> None:
    tried: list[int] = []

    def fail() -> dict[str, Any]:
        tried.append(1)
        raise CheckFailed("no compiler", fix="none")

    held = contest(contender("ours", "ours", 1.0, 1.0), Variant("broken", "peer", fail))
    held.run(2, 0, quiet)
    assert held.complete
    assert held.rounds == 2
    assert tried == [1]
    assert "failed: no compiler" in held.markdown()


def test_ours_must_not_fail() -> None:
    def fail() -> dict[str, Any]:
        raise CheckFailed("broken", fix="none")

    with pytest.raises(CheckFailed, match="broken"):
        contest(Variant("ours", "ours", fail)).run(1, 0, quiet)


def test_what_an_interruption_left_is_shown() -> None:
    def interrupted() -> dict[str, Any]:
        if len(one.measurements) == 2:
            raise KeyboardInterrupt
        return {"tokens_per_second": 5.0}

    one = Variant("ours", "ours", interrupted)
    held = contest(one)
    held.run(5, 0, quiet)
    assert not held.complete
    assert held.rounds == 2
    assert "2 rounds, interleaved (interrupted)" in held.markdown()
