"""Warnings about text that is read too often, and about a held-out loss that rises: memorizing looks like learning.

They are records of the ledger, and change nothing that training computes.
"""

from __future__ import annotations

import logging

from resmol.config.run_config import RunConfig
from resmol.data.loader import Loader
from resmol.run.held_out import TURN_EVALUATIONS, TURN_MARGIN, has_turned, held_out_losses
from resmol.run.log_writers import RunLog

logger = logging.getLogger(__name__)

# Up to 4 passes are worth about as much as new text; of 16, little more is gained (Muennighoff et al. 2023, section 6).
MAX_EPOCHS = 4


def announce_repetition(config: RunConfig, loader: Loader, step: int, windows_seen: int) -> None:
    """Log a warning where the steps that are planned will pass MAX_EPOCHS, and have not yet."""
    planned = windows_seen + (config.train.steps - step) * loader.windows_per_step
    if windows_seen <= MAX_EPOCHS * loader.n_windows < planned:
        logger.warning(
            f"{config.train.steps:,} steps read the training text {planned / loader.n_windows:.1f} times; beyond "
            f"{MAX_EPOCHS} a model learns it by heart rather than learning from it: take more text or fewer steps, and "
            "judge the run by its held-out loss"
        )


def record_repetition(run_log: RunLog, loader: Loader, step: int, windows_seen: int) -> None:
    """Record the step with which the run passes MAX_EPOCHS.

    Args:
        run_log: The ledger.
        loader: The batches of the training text.
        step: The step that was done.
        windows_seen: Windows of this step and all before it.
    """
    limit = MAX_EPOCHS * loader.n_windows
    if windows_seen - loader.windows_per_step <= limit < windows_seen:
        what = f"the training text was read {MAX_EPOCHS} times; judge the run by its held-out loss from here"
        run_log.write("warn", what=what, step=step)


def record_turn(run_log: RunLog, step: int) -> None:
    """Record that the held-out loss has turned, with the evaluation that shows it; once for each lowest loss."""
    losses = held_out_losses(run_log.records)
    if has_turned(list(losses.values())):
        best = min(losses, key=lambda step: losses[step])
        what = (
            f"the last {TURN_EVALUATIONS} held-out losses lie more than {TURN_MARGIN:.0%} above the lowest, which was "
            f"that of step {best}"
        )
        run_log.write("warn", what=what, step=step, lowest=losses[best], now=losses[step])
