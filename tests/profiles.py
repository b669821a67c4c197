"""Hypothesis profiles: `ci` tries the same examples every time, `fuzz` tries new ones, and ten times as many.

Neither measures time, so that a busy machine fails no test. What `fuzz` finds is kept in .hypothesis and tried first
the next time; it belongs into an ``@example`` of its test, for `ci` to see.
"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, register_random, settings

UNTIMED = [HealthCheck.too_slow]
CI_EXAMPLES = 100

settings.register_profile(
    "ci", max_examples=CI_EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=UNTIMED
)
settings.register_profile(
    "fuzz", settings.get_profile("default"), max_examples=10 * CI_EXAMPLES, deadline=None, print_blob=True,
    suppress_health_check=UNTIMED,
)  # fmt: skip


def examples(count: int) -> settings:
    """Return settings for ``count`` examples in the profile `ci`, and as many times more as another profile tries."""
    return settings(max_examples=count * settings.default.max_examples // CI_EXAMPLES)


class _TorchRandom:
    """PyTorch's global generator, for Hypothesis to seed before each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()  # Hypothesis keeps no reference of its own
register_random(_TORCH_RANDOM)
