"""Intervals that cover as often as they say, and verdicts that the noise does not make."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from resmol.bench.paired_stats import Ratio, interleaved, is_too_noisy, paired_ratio, verdict


def measured(draw: random.Random, rounds: int, *factors: float, noise: float = 0.03) -> list[list[float]]:
    """Series of the given speeds: each round has a weather of its own, each measurement its noise."""
    weather = [draw.gauss(0, 0.3) for _ in range(rounds)]
    return [[100 * f * math.exp(w + draw.gauss(0, noise)) for w in weather] for f in factors]


def test_the_interval_of_five_pairs_by_hand() -> None:
    """t(0.975, 4) = 2.776 (Fisher and Yates, table III)."""
    logs = [0.01, 0.02, 0.03, 0.04, 0.05]
    ratio = paired_ratio([math.exp(x) for x in logs], [1.0] * 5)
    half = 2.776 * statistics.stdev(logs) / math.sqrt(5)
    assert (ratio.middle, ratio.low, ratio.high) == pytest.approx(
        tuple(map(math.exp, (0.03, 0.03 - half, 0.03 + half)))
    )


def test_intervals_cover_the_truth_in_95_of_100_cases() -> None:
    draw, covered = random.Random(1), 0
    for _ in range(2000):
        base, other = measured(draw, 5, 1.0, 1.1)
        covered += paired_ratio(other, base).contains(1.1)
    assert 0.93 <= covered / 2000 <= 0.97


def test_what_is_the_same_is_seldom_called_different_and_20_percent_is_found() -> None:
    draw, wrong, found = random.Random(2), 0, 0
    for _ in range(500):
        base, same, faster, control = measured(draw, 5, 1.0, 1.0, 1.2, 1.0)
        noise = paired_ratio(control, base)
        wrong += verdict(paired_ratio(same, base), noise) not in (
            "no difference shown",
            "no verdict: the control differs from itself",
        )
        found += verdict(paired_ratio(faster, base), noise).startswith("faster by")
    assert wrong / 500 < 0.02
    assert found / 500 > 0.8


def test_a_control_that_differs_forbids_every_verdict() -> None:
    """As in the tables whose identical rows differed by 20-42 %."""
    control = Ratio(1.3, 1.2, 1.42)
    assert is_too_noisy(control)
    assert verdict(Ratio(2.0, 1.9, 2.1), control).startswith("no verdict")


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (Ratio(1.1, 1.06, 1.14), "faster by 10 % (6 % to 14 %)"),
        (Ratio(0.8, 0.78, 0.82), "slower by 25 % (22 % to 28 %)"),
        (Ratio(1.02, 1.01, 1.03), "no difference shown"),
    ],
)
def test_words(ratio: Ratio, words: str) -> None:
    assert verdict(ratio, Ratio(1.0, 0.96, 1.04)) == words


def test_every_round_measures_every_variant_once_in_changing_order() -> None:
    rounds = interleaved(6, 20, seed=0)
    assert all(sorted(order) == list(range(6)) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 10


def test_a_single_pair_shows_nothing() -> None:
    assert not is_too_noisy(Ratio(1.0, 1.0, 1.0))
    assert paired_ratio([2.0], [1.0]).contains(1e9)
