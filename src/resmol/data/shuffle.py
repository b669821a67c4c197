"""Shuffling: a keyed permutation of the windows, computed for any position without looking at the others.

Position p = epoch * n + i is the p-th window that training sees. Within an epoch, i -> window is a bijection
of [0, n), re-keyed every epoch, so that each window is seen exactly once an epoch and a run can start at any
position with no state but the position. The batch size and the number of ranks play no role.

The bijection is a Feistel network, which permutes [0, 2^b) whatever its round function is (Luby and Rackoff,
"How to construct pseudorandom permutations from pseudorandom functions", 1988); values that fall outside [0,
n) go through the network again until they are inside (cycle walking: Black and Rogaway, "Ciphers with
arbitrary finite domains", CT-RSA 2002). As 2^b < 2n, that takes fewer than two passes on average.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from jaxtyping import Int64, UInt64

# Four make it pseudorandom; an even number leaves both halves in place, also if they differ in width.
_ROUNDS = 6
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: a product spreads low bits to the top
_HALF_WORD = np.uint64(32)


class WindowShuffle:
    """The order of ``n_windows`` windows over all epochs.

    Attributes:
        n_windows: Windows per epoch, at least 1.
        seed: Any integer; part of a run's identity.
    """

    def __init__(self, n_windows: int, seed: int) -> None:
        if n_windows < 1:
            raise ValueError(f"an order needs at least one window, not {n_windows}")
        self.n_windows = n_windows
        self.seed = seed
        bits = max(2, (n_windows - 1).bit_length())
        self._low_bits, self._high_bits = bits // 2, bits - bits // 2

    def windows(self, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the window at each position (positions >= 0, in any order, repeats allowed)."""
        epochs, places = np.divmod(positions, self.n_windows)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = self._walk(places[chosen].astype(np.uint64), _round_keys(self.seed, int(epoch)))
        return result

    def _walk(self, values: UInt64[np.ndarray, " n"], keys: tuple[np.uint64, ...]) -> UInt64[np.ndarray, " n"]:
        values = self._permute(values, keys)
        outside = np.flatnonzero(values >= self.n_windows)
        while outside.size:
            values[outside] = self._permute(values[outside], keys)
            outside = outside[values[outside] >= self.n_windows]
        return values

    def _permute(self, values: UInt64[np.ndarray, " n"], keys: tuple[np.uint64, ...]) -> UInt64[np.ndarray, " n"]:
        low_bits = np.uint64(self._low_bits)
        low = values & np.uint64((1 << self._low_bits) - 1)
        high = values >> low_bits
        for number in range(0, _ROUNDS, 2):
            low = low ^ _round(high, keys[number], self._low_bits)
            high = high ^ _round(low, keys[number + 1], self._high_bits)
        return (high << low_bits) | low


def _round(half: UInt64[np.ndarray, " n"], key: np.uint64, bits: int) -> UInt64[np.ndarray, " n"]:
    """Hash one half to ``bits`` bits; arithmetic modulo 2^64, the same on every machine."""
    mixed = (half + key) * _MIX
    mixed ^= mixed >> _HALF_WORD
    mixed *= _MIX
    return mixed >> np.uint64(64 - bits)


@lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[np.uint64, ...]:
    """Return the keys of one epoch: SHA-512 of the seed and the epoch, cut into 64-bit numbers."""
    digest = hashlib.sha512(f"resmol window order, seed {seed}, epoch {epoch}".encode("ascii")).digest()
    return tuple(np.frombuffer(digest, dtype="<u8").astype(np.uint64))
