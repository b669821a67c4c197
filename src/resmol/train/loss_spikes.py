"""Is a loss out of line with the ones before it? A robust rule, whose whole state is a short list of losses."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

HISTORY = 64  # losses that are kept; they are part of a checkpoint, so that a resume does not change a decision
MIN_HISTORY = 16  # with fewer than these there is no opinion
THRESHOLD = 8.0  # deviations; of a normal number, fewer than one in 10^14 lies further out
LEAST_DEVIATION = 0.01  # of the median: losses that hardly vary at all are no reason for alarm


def is_spike(loss: float, recent: Sequence[float]) -> bool:
    """Tell whether ``loss`` lies far above the median of ``recent``.

    The deviation is 1.4826 times the median absolute one, which for normal numbers is the standard deviation (Hampel
    1974); unlike it, half of the losses may be spikes without moving the rule.
    """
    if len(recent) < MIN_HISTORY:
        return False
    median = statistics.median(recent)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in recent)
    return loss > median + THRESHOLD * max(deviation, LEAST_DEVIATION * abs(median))


def append_loss(loss: float, recent: Sequence[float]) -> tuple[float, ...]:
    """Return the losses to remember after ``loss``."""
    return (*recent, loss)[-HISTORY:]
