"""The record of runs that are compared by how they learn; a finished run is kept at once and never repeated."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from resmol.bench.learning import Curve, Point
from resmol.bench.machine import machine_facts
from resmol.bench.subprocess_runs import prepared_folder
from resmol.bench.variants import Overrides
from resmol.config.run_config import RunConfig, field_declarations
from resmol.config.strict_model import StrictModel
from resmol.data.shards import open_dataset
from resmol.errors import CheckFailed, UsageError
from resmol.system.atomic_io import write_durable
from resmol.train.autotune import resolve_auto

logger = logging.getLogger(__name__)

SEEDS = ("train.seed", "data.seed")  # each run has its own; a record can begin with any


class Cell(StrictModel):
    """A finished run: its settings, or the name of the learner, its seed, and how it learned; or why it failed."""

    settings: Overrides
    seed: int
    curve: Curve = ()
    failure: str = ""

    @property
    def last(self) -> Point | None:
        """The point after the last step; None of a run that failed."""
        return self.curve[-1] if self.curve else None

    def describe(self) -> str:
        """Return a phrase about its end."""
        return f"{self.last.bits_per_byte:.4f} bits per byte" if self.last else f"failed: {self.failure}"


class LearningRecord(StrictModel):
    """All finished runs that have a configuration and a text in common."""

    base: dict[str, Any]
    data_fingerprint: str
    facts: dict[str, Any]
    cells: tuple[Cell, ...] = ()

    def find(self, settings: Overrides, seed: int) -> Cell | None:
        """Return the run of some settings with a seed, or None."""
        return next((cell for cell in self.cells if (cell.settings, cell.seed) == (settings, seed)), None)

    def ends(self, settings: Overrides, seeds: range) -> dict[int, Point]:
        """Return where the runs of some settings ended, by seed."""
        cells = (self.find(settings, seed) for seed in seeds)
        return {cell.seed: cell.last for cell in cells if cell is not None and cell.last is not None}

    def with_run(self, settings: Overrides, seed: int, learn: Callable[[], Curve], file: Path) -> LearningRecord:
        """Do a run, and keep it in the file; one that fails has a row as well, until `open_record` drops it.

        Args:
            settings: Those of the run.
            seed: That of the run.
            learn: Does it.
            file: Where the record lies.
        """
        try:
            cell = Cell(settings=settings, seed=seed, curve=learn())
        except CheckFailed as error:
            cell = Cell(settings=settings, seed=seed, failure=error.what)
        record = self.model_copy(update={"cells": (*self.cells, cell)})
        write_durable(file, json.dumps(record.model_dump(mode="json"), indent=1).encode())
        return record


@dataclass(frozen=True)
class Study:
    """Where runs are compared: what they have in common, and the places of their files.

    Attributes:
        config: The configuration, without ``auto``.
        folder: A temporary folder for the files of a run.
        data: A prepared folder.
        file: Where the record lies.
        record: The runs that are done.
    """

    config: RunConfig
    folder: Path
    data: str
    file: Path
    record: LearningRecord


@contextmanager
def open_study(config: RunConfig, data: str | None, file: Path | None, records: Path) -> Iterator[Study]:
    """Decide ``auto`` once, so that all runs compute alike, prepare the text, and read or begin the record.

    Args:
        config: The configuration.
        data: A prepared folder or text; None takes the plays of Shakespeare.
        file: The record; None takes one in ``records`` that the configuration determines.
        records: The folder of such records.

    Raises:
        DataError: The text or the tokenizer is missing or unusable.
        UsageError: See `open_record`.
    """
    resolved, choices = resolve_auto(config)
    for sentence in choices:
        logger.info(sentence)
    place = file or records / f"{resolved.name}-{resolved.sha256[:12]}.json"
    with tempfile.TemporaryDirectory(prefix="resmol-bench-") as temporary:
        folder = Path(temporary)
        prepared = prepared_folder(data, resolved, folder / "data")
        record = open_record(place, resolved, open_dataset(Path(prepared)).fingerprint)
        yield Study(resolved, folder, prepared, place, record)
    logger.info(f"record: {place}")


def open_record(file: Path, base: RunConfig, data_fingerprint: str) -> LearningRecord:
    """Read a record, or begin one. Of a run that failed it keeps nothing, so that the same command tries it again.

    A field that a record does not have came later than it, and was at its default.

    Raises:
        UsageError: It is that of another configuration or text, or no record at all.
    """
    facts = machine_facts(base.runtime.threads)
    fields = {**base.bound_fields(), "train.steps": base.train.steps}
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        return LearningRecord(base=fields, data_fingerprint=data_fingerprint, facts=facts)
    try:
        record = LearningRecord.model_validate_json(file.read_bytes())
    except ValidationError:
        raise UsageError(f"{file} is no record of runs that learn", fix="name another file with --record") from None
    known = {key: value for key, value in json.loads(json.dumps(fields)).items() if key not in SEEDS}
    before = {key: declared.get_default() for key, declared in field_declarations().items()} | record.base
    changed = next((key for key, value in known.items() if before.get(key) != value), None)
    if changed is None and record.data_fingerprint != data_fingerprint:
        raise UsageError(f"{file} is the record of another text", fix="name another file with --record")
    if changed is not None:
        raise UsageError(
            f"{file} is the record of another configuration: its {changed} is {before.get(changed)!r}, and "
            f"{known[changed]!r} is asked for now",
            fix="name another file with --record",
        )
    return record.model_copy(update={"cells": tuple(cell for cell in record.cells if not cell.failure)})
