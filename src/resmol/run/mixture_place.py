"""Where a run stands in a mixture, as its checkpoints hold it."""

from __future__ import annotations

from resmol.config.data_config import StageConfig
from resmol.config.strict_model import StrictModel


class MixturePlace(StrictModel):
    """Where a run stands in a mixture; a tuple has a number for each source, in the order of the configuration.

    Attributes:
        seen: Windows of each source that were read, over all epochs.
        stage: The stage in force at the next step.
        in_stage: Windows of each source that were read since it came into force.
    """

    seen: tuple[int, ...]
    stage: StageConfig
    in_stage: tuple[int, ...]
