from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmol.data.shuffle import WindowShuffle


def epochs(n: int, seed: int, count: int) -> list[list[int]]:
    return WindowShuffle(n, seed).windows(np.arange(count * n, dtype=np.int64)).reshape(count, n).tolist()


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4097])
def test_every_window_comes_exactly_once_an_epoch(n):
    for order in epochs(n, 1, 3):
        assert sorted(order) == list(range(n))


def test_epochs_and_seeds_differ():
    first, second = epochs(1000, 1, 2)
    (other,) = epochs(1000, 2, 1)
    assert first != second
    assert first != other
    assert first != sorted(first)
    # Independent permutations of n elements agree in about one place.
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 12


@given(st.integers(1, 5000), st.integers(0, 2**63), st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_a_position_has_one_window_whoever_asks_and_however(n, seed, positions):
    together = WindowShuffle(n, seed).windows(np.array(positions, dtype=np.int64)).tolist()
    one_by_one = [int(WindowShuffle(n, seed).windows(np.array([position]))[0]) for position in positions]
    assert together == one_by_one
    assert all(0 <= window < n for window in together)


def test_the_order_is_fixed_for_ever():
    # A run of today must resume with the windows of today: a change here is a change of the data format.
    positions = np.array([0, 1, 2, 999, 1000, 123_456_789])
    assert WindowShuffle(1000, 0).windows(positions).tolist() == GOLDEN_SEED_0
    assert WindowShuffle(1_000_003, 42).windows(positions).tolist() == GOLDEN_SEED_42


GOLDEN_SEED_0 = [676, 129, 532, 851, 626, 780]
GOLDEN_SEED_42 = [1777, 660028, 623844, 268765, 400694, 743220]


def test_places_are_uniform():
    counts = np.zeros((7, 7))
    for seed in range(2000):
        counts[np.arange(7), epochs(7, seed, 1)[0]] += 1
    expected = 2000 / 7
    # 36 degrees of freedom: mean 36; small domains mix less well than large ones, so this is a coarse bound.
    assert ((counts - expected) ** 2 / expected).sum() < 150


def test_neighbours_are_not_neighbours_any_more():
    (order,) = epochs(20_000, 5, 1)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert np.count_nonzero(np.abs(np.diff(order)) == 1) < 20


def test_a_million_positions_take_a_moment():
    windows = WindowShuffle(1_000_000, 3).windows(np.arange(1_000_000, dtype=np.int64))
    assert np.bincount(windows).max() == 1


def test_no_windows_are_no_order():
    with pytest.raises(ValueError, match="at least one"):
        WindowShuffle(0, 1)
