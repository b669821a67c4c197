"""The data that a run was trained on, if it is still at hand and is still the same."""

from __future__ import annotations

from resmol.config.run_config import RunConfig
from resmol.data.resolve import recorded_folder
from resmol.data.shards import Dataset, open_dataset
from resmol.errors import DataError
from resmol.run.directory import RunDir
from resmol.run.ledger import first_record


def recorded_data(run: RunDir, config: RunConfig) -> Dataset | None:
    """Return the prepared data of a run; None where it is missing or was changed since.

    Args:
        run: The run directory; its ledger begins with the fingerprint of the data.
        config: Its configuration, which names the folder.
    """
    try:
        dataset = open_dataset(recorded_folder(run, config.data.path))
    except (DataError, OSError):
        return None
    start = first_record(run.ledger) or {}
    return dataset if start.get("data_fingerprint") == dataset.fingerprint else None
