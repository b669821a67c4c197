"""The model of a step over a network: the numbers that were put in come out again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import network
import pytest


def test_the_fit_finds_what_made_the_times() -> None:
    size, share, hidden = 36e6, 0.7, 0.5

    def seconds(point: Any) -> float:
        compute = 0.5 + 0.1 * point.ranks
        if not point.megabits:
            return compute
        crossing = 2 * (point.ranks - 1) / point.ranks * size / (share * point.megabits * 1e6 / 8)
        return compute + max(0.0, crossing - (hidden * compute if point.overlap else 0.0))

    found = network.fit([replace(p, seconds=seconds(p)) for p in network.POINTS], size)
    assert (found.share, found.hidden) == (pytest.approx(share), pytest.approx(hidden))
    assert found.error < 1e-9


def test_what_is_far_away_costs_no_less() -> None:
    far = [network.extrapolate(network.Fit(0.8, 0.5, 0.0), devices) for devices in (8, 64, 1024)]
    assert [one["efficiency"] for one in far] == sorted((one["efficiency"] for one in far), reverse=True)
    assert all(one["step"] >= one["exposed"] + one["saving"] > 0 for one in far)
