"""Which configuration was in force at which line of the ledger.

The ledger has the fields that the numbers depend on (drift class A and B): all of them in its ``start`` record, and
the accepted changes in ``drift`` records. ``config.toml`` is the same for people to read, with the fields of class C;
where the two differ, the file was edited.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from resmol.config.run_config import RunConfig
from resmol.config.tables import nested
from resmol.errors import ConfigError
from resmol.run.ledger import Record, scan


class ConfigHistory:
    """The configurations of a run, one for each stretch of the ledger between two accepted drifts."""

    def __init__(self, records: Sequence[Record], stored: RunConfig | None) -> None:
        """Follow the drifts.

        Args:
            records: The records of a ledger, which begins with a ``start`` record; of the others ``drift`` is enough.
            stored: The configuration in the run directory, for its fields of class C; None takes their defaults.

        Raises:
            ConfigError: The recorded fields make no configuration.
        """
        try:
            self._stretches = list(_stretches(records, stored))
        except (KeyError, TypeError, AttributeError):
            raise ConfigError(
                "the ledger's records of the configuration are not those that resmol writes",
                fix="restore ledger.jsonl from a copy",
            ) from None

    @property
    def newest(self) -> RunConfig:
        """The configuration in force at the end of the ledger."""
        return self._stretches[-1][1]

    def at(self, record: Record) -> RunConfig:
        """Return the configuration in force where a record stands."""
        return next(config for first, config in reversed(self._stretches) if record["seq"] >= first)

    def unrecorded_changes(self, records: Sequence[Record]) -> Iterator[Record]:
        """Yield the records whose ``config_sha256`` is not that of the configuration in force there."""
        for record in records:
            if "config_sha256" in record and record["config_sha256"] != self.at(record).sha256:
                yield record


def _stretches(records: Sequence[Record], stored: RunConfig | None) -> Iterator[tuple[int, RunConfig]]:
    """Yield the line where each configuration begins to be in force."""
    start = records[0]["config"]
    sources = _sources(records) if stored is None else {}
    config = stored.replace(start) if stored else RunConfig.parse(nested(start | sources), "recorded in the ledger")
    yield 0, config
    for record in records:
        if record["kind"] == "drift":
            config = config.replace({key: change["to"] for key, change in record["changes"].items()})
            yield record["seq"], config


def _sources(records: Sequence[Record]) -> dict[str, Any]:
    """Return the names of the sources of a mixture, for a configuration whose paths are lost; nothing without one."""
    newest = next((record["sources"] for record in reversed(records) if "sources" in record), None)
    return {} if newest is None else {"data.source": [{"name": source["name"]} for source in newest]}


def recorded_config(ledger: Path, stored: RunConfig | None) -> RunConfig | None:
    """Return the configuration that a ledger states last; None where a crash came before its first line.

    The chain is not verified here: this is what a start compares its arguments with, before it opens the ledger.

    Raises:
        ConfigError: The recorded fields make no configuration.
    """
    records = list(scan(ledger, "start", "drift"))
    return ConfigHistory(records, stored).newest if records and records[0]["kind"] == "start" else None
