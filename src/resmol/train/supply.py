"""Whether the sources of a mixture last until the end of a run: checked before it trains, since it can be computed."""

from __future__ import annotations

import bisect
import logging
import math

from resmol.config.run_config import RunConfig
from resmol.data.mixture import MixtureOrder
from resmol.errors import ConfigError

logger = logging.getLogger(__name__)


def check_supply(config: RunConfig, order: MixtureOrder | None, step: int = 0) -> None:
    """Refuse steps for which a source would be read more often than its ``max_epochs`` says.

    Args:
        config: Its ``train.steps`` are planned.
        order: The order of a mixture from ``step`` on; None is no mixture, whose only source is repeated.
        step: Steps that are done.

    Raises:
        ConfigError: A source does not last; the message says how far it does.
    """
    if order is None or config.data.source is None:
        return
    planned = zip(config.data.source, order.sizes, order.most_read(config.train.steps), strict=True)
    for number, (source, size, most) in enumerate(planned):
        limit = source.max_epochs * size
        if most > limit:
            steps = range(step, config.train.steps + 1)
            last = bisect.bisect_right(steps, limit, key=lambda steps: order.most_read(steps)[number]) - 1
            fewer = f", or train for {steps[last]:,} steps" if last > 0 else ""
            raise ConfigError(
                f"{config.train.steps:,} steps read the source {source.name} {most / size:.2f} times ({most:,} of its "
                f"{size:,} windows), and its max_epochs is {source.max_epochs:g}",
                fix=f"state max_epochs = {math.ceil(most / size)} for it, give it less weight{fewer}",
            )


def announce_mixture(config: RunConfig, order: MixtureOrder | None) -> None:
    """Log how often the planned steps read each source of a mixture."""
    if order is not None:
        for name, size, most in zip(order.names, order.sizes, order.most_read(config.train.steps), strict=True):
            logger.info(
                f"mixture: {name}: at most {most:,} windows until step {config.train.steps:,}, {most / size:.2f} epochs"
            )
