"""Loss spikes: a robust outlier rule, whose whole state is a short list of losses."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

HISTORY = 64  # losses to keep; they are part of a checkpoint, so that a resume does not change a decision
MIN_HISTORY = 16  # no decision with fewer losses
THRESHOLD = 8.0  # deviations above the median; a normal variable exceeds that with probability below 10^-14
MIN_DEVIATION = 0.01  # as a share of the median: small steps of losses that hardly vary are no spikes


def is_spike(loss: float, recent: Sequence[float]) -> bool:
    """Return whether ``loss`` lies far above the median of ``recent``.

    The deviation is 1.4826 times the median absolute deviation, which estimates the standard deviation of a normal
    distribution (Hampel 1974), and which up to half of the losses can be spikes without spoiling.
    """
    if len(recent) < MIN_HISTORY:
        return False
    median = statistics.median(recent)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in recent)
    return loss > median + THRESHOLD * max(deviation, MIN_DEVIATION * abs(median))


def append_loss(loss: float, recent: Sequence[float]) -> tuple[float, ...]:
    """Return ``recent`` with ``loss`` at its end, cut to the last HISTORY losses."""
    return (*recent, loss)[-HISTORY:]
