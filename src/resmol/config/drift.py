"""Drift: a run that goes on with another configuration. The class of a field decides whether it may.

* **A**: refused. The numbers would no longer be those of one continuous run.
* **B**: refused, unless ``--accept-drift section.key`` is given; the change becomes a record in the ledger.
* **C**: free. It does not touch the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resmol.config.run_config import RunConfig, drift_classes, flatten
from resmol.errors import ConfigError


def _way_out(refused: Sequence[str], fixed: Sequence[str]) -> str:
    """Return what to do about refused changes: those of class A cannot be accepted, so nothing else then helps."""
    if fixed:
        return f"undo the change of {', '.join(fixed)} (also in config.toml), or start a new run directory"
    accept = " ".join(f"--accept-drift {key}" for key in refused)
    return f"undo it (also in config.toml), start a new run directory, or go on with it: add {accept} (it is recorded)"


def reconcile(
    stored: RunConfig, requested: RunConfig, accepted: Sequence[str] = ()
) -> tuple[RunConfig, dict[str, Any]]:
    """Decide whether a run may go on with another configuration.

    An ``auto`` in the runtime section stands for what was decided when the run started.

    Args:
        stored: The configuration in the run directory.
        requested: The configuration that the user asks for now.
        accepted: The ``section.key`` names given with ``--accept-drift``.

    Returns:
        The configuration to go on with, and the accepted drifts as ``key -> {"from": ..., "to": ...}``.

    Raises:
        ConfigError: A class A field differs, or a class B field that was not accepted; all are listed.
    """
    before, after, classes = flatten(stored), flatten(requested), drift_classes()
    decided = [key for key in before if key.startswith("runtime.") and after[key] == "auto"]
    changed = [key for key in before if before[key] != after[key] and key not in decided]
    refused = [key for key in changed if classes[key] == "A" or (classes[key] == "B" and key not in accepted)]
    if refused:
        lines = "\n".join(f"  - {key} (class {classes[key]}): {before[key]!r} -> {after[key]!r}" for key in refused)
        raise ConfigError(
            f"the configuration differs from the one that the run's ledger recorded:\n{lines}",
            fix=_way_out(refused, [key for key in refused if classes[key] == "A"]),
        )
    drifts = {key: {"from": before[key], "to": after[key]} for key in changed if classes[key] == "B"}
    return requested.replace({key: before[key] for key in decided}), drifts
