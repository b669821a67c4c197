"""The order of a mixture: counts within a window of the weights in every stage; each source in its own order."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from profiles import examples

from resmol.config.data_config import StageConfig
from resmol.data.mixture import MixtureOrder, assign, whole_weights
from resmol.data.shuffle import WindowShuffle

NAMES = ("web", "code", "math")
STAGES = (
    StageConfig(start=1, weights={"web": 0.7, "code": 0.3}),
    StageConfig(start=6, weights={"web": 1, "math": 2}),
    StageConfig(start=9, weights={"web": 3, "code": 1.5, "math": 1}),
)


@examples(60)
@example([1, 17, 1, 17, 1], 37)  # the source with the largest deficit is one more than a window behind after 24
@given(st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(any), st.integers(1, 200))
def test_counts_are_within_one_window_of_the_weights(weights: list[int], number: int) -> None:
    """After each window, by exact fractions; so they are after any number, wherever the assignment was interrupted."""
    counts = Counter[int]()
    straight = assign(weights, [0] * len(weights), number)
    for done, source in enumerate(straight, start=1):
        counts[source] += 1
        quotas = [Fraction(weight, sum(weights)) * done for weight in weights]
        assert all(abs(counts[one] - quota) < 1 for one, quota in enumerate(quotas))
    middle = number // 2
    before = Counter(straight[:middle])
    assert assign(weights, [before[one] for one in range(len(weights))], number - middle) == straight[middle:]


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ({"web": 0.1, "code": 0.2}, [1, 2, 0]),
        ({"web": 60, "code": 25.5, "math": 14.5}, [120, 51, 29]),
        ({"math": 1e-7, "web": 1e9}, [10**16, 0, 1]),
    ],
)
def test_weights_are_the_fractions_that_their_decimals_state(weights: dict[str, float], whole: list[int]) -> None:
    assert whole_weights(StageConfig(start=1, weights=weights), NAMES) == whole


def steps_of(order: MixtureOrder, per_step: int, first: int, last: int) -> list[list[int]]:
    return [order.windows(np.arange(per_step) + per_step * (step - 1)).tolist() for step in range(first, last + 1)]


def test_each_source_is_read_in_its_own_order_and_each_stage_begins_anew() -> None:
    sizes, per_step = (23, 7, 11), 5
    order = MixtureOrder(NAMES, sizes, 8, STAGES, per_step)
    steps = steps_of(order, per_step, 1, 14)
    borders = [0, 23, 30, 41]
    for source, size in enumerate(sizes):
        mine = [window for step in steps for window in step if borders[source] <= window < borders[source + 1]]
        alone = WindowShuffle(size, 8).windows(np.arange(len(mine)))
        assert mine == (alone + borders[source]).tolist()
    for stage, part in zip(STAGES, (steps[:5], steps[5:8], steps[8:]), strict=True):
        counts = Counter(next(i for i in range(3) if window < borders[i + 1]) for step in part for window in step)
        for source, name in enumerate(NAMES):
            quota = stage.weights.get(name, 0) / sum(stage.weights.values()) * 5 * len(part)
            assert abs(counts[source] - quota) < 1, (name, counts)
    assert order.place_at(14 * per_step).seen == tuple(
        sum(borders[i] <= window < borders[i + 1] for step in steps for window in step) for i in range(3)
    )


@pytest.mark.parametrize("done", [0, 1, 4, 5, 6, 8, 11])
def test_it_goes_on_from_any_place(done: int) -> None:
    """Also backwards, and over borders of stages; and what will be read is known, to a window for each stage."""
    straight = MixtureOrder(NAMES, (23, 7, 11), 8, STAGES, 5)
    wanted = steps_of(straight, 5, 1, 14)
    resumed = MixtureOrder(NAMES, (23, 7, 11), 8, STAGES, 5, step=done, place=straight.place_at(5 * done))
    assert steps_of(resumed, 5, done + 1, 14) == wanted[done:]
    assert steps_of(resumed, 5, done + 1, done + 2) == wanted[done : done + 2]
    found, most = straight.place_at(70).seen, resumed.most_read(14)
    assert all(0 <= bound - seen <= len(STAGES) for bound, seen in zip(most, found, strict=True))
    with pytest.raises(ValueError, match="begins at"):
        resumed.windows(np.arange(5) + 5 * done + 1)


def test_other_weights_and_a_new_source_begin_where_the_run_stands() -> None:
    before = MixtureOrder(NAMES[:2], (23, 7), 8, STAGES[:1], 5).place_at(15)
    stages = (StageConfig(start=1, weights={"web": 1, "code": 1, "math": 2}),)
    order = MixtureOrder(NAMES, (23, 7, 11), 8, stages, 5, step=3, place=before)
    windows = [window for step in steps_of(order, 5, 4, 7) for window in step]
    assert sorted(math.floor(np.searchsorted([0, 23, 30], window, "right") - 1) for window in windows) == [
        *[0] * 5, *[1] * 5, *[2] * 10,
    ]  # fmt: skip
    assert windows[windows.index(next(w for w in windows if w < 23))] == WindowShuffle(23, 8).windows(
        np.array([before.seen[0]])
    )
    assert order.place_at(35).seen == (before.seen[0] + 5, before.seen[1] + 5, 10)
