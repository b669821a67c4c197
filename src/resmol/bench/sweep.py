"""`resmol ablate --seeds`: which settings learn best, by whole runs over several seeds.

A seed decides the initial weights and the order of the data. Each seed trains every variant, and variants are compared
within a seed: that takes the luck of a draw out of the difference. Every finished run is kept in a record at once, so
the same command goes on where it was stopped, and other variants of the same configuration add to the same record.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from resmol.bench.comparison import markdown_table
from resmol.bench.learning import MeasureLearning, for_learning, measure_learning
from resmol.bench.learning_record import LearningRecord, open_study
from resmol.bench.paired_stats import Interval, mean_interval
from resmol.bench.variants import Overrides, base_and_factors, check_variants, combinations, variant_name
from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.errors import UsageError
from resmol.system.tables import text_table
from resmol.system.wording import counted

logger = logging.getLogger(__name__)

RECORDS = Path("runs") / "ablations"
POINTS = 2  # held-out losses of a run: half-way, since what leads there may not win, and at the end
TITLES = ("", "held-out bits per byte", "against the first row", "tokens", "seconds of training")


@dataclass(frozen=True)
class Sweep:
    """What to compare.

    Attributes:
        config: The configuration whose other settings stay as they are.
        factors: ``key=a,b``: every combination of the values is a variant. ``key=a`` is laid over the configuration.
        variants: Further variants, each ``key=value key=value``; if there are no factors, the first row is the
            configuration as it is.
        data: A prepared folder or text; None takes the plays of Shakespeare.
        seeds: How many seeds, from those of the configuration upwards.
        steps: Length of a run.
        record: The file of the finished runs; None takes one in `RECORDS` that the configuration determines.
    """

    config: RunConfig
    factors: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    data: str | None = None
    seeds: int = 3
    steps: int = 1000
    record: Path | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} is {getattr(self, name)}", fix="give at least 1")

    def base_and_rows(self) -> tuple[RunConfig, list[Overrides]]:
        """Return what the variants share and the settings of each (`UsageError`, `ConfigError`: `check_variants`)."""
        base, factors = base_and_factors(self.config, self.factors)
        rows = [*combinations(factors), *(tuple(words) for words in map(str.split, self.variants))]
        check_variants(base, rows, least=1)  # alone, it is how well the configuration learns
        return base, rows


class SweepResult:
    """The runs of a sweep so far, and its table."""

    def __init__(self, sweep: Sweep, rows: list[Overrides], record: LearningRecord) -> None:
        self.sweep, self.rows, self.record = sweep, rows, record
        first = base_and_factors(sweep.config, sweep.factors)[0].train.seed
        self.seeds = range(first, first + sweep.seeds)

    @property
    def missing(self) -> list[tuple[Overrides, int]]:
        """The runs that are still to be done; one seed after the other, so that every seed completes a table."""
        return [(row, seed) for seed in self.seeds for row in self.rows if self.record.find(row, seed) is None]

    def difference(self, row: Overrides) -> Interval | None:
        """Return the bits per byte of a variant minus those of the first one, paired by seed; None without a pair."""
        ours, first = self.record.ends(row, self.seeds), self.record.ends(self.rows[0], self.seeds)
        pairs = [ours[seed].bits_per_byte - first[seed].bits_per_byte for seed in ours.keys() & first.keys()]
        return mean_interval(pairs) if pairs else None

    def cells(self) -> list[list[str]]:
        """Return the rows of the table."""
        return [self._row(row) for row in self.rows]

    def _row(self, row: Overrides) -> list[str]:
        ends = list(self.record.ends(row, self.seeds).values())
        if not ends:
            failures = {cell.failure for cell in self.record.cells if cell.settings == row and cell.failure}
            return [variant_name(row), f"failed: {'; '.join(failures)}" if failures else "", "", "", ""]
        difference = self.difference(row) if row != self.rows[0] else None
        seconds = sum(end.seconds for end in ends) / len(ends)
        return [
            variant_name(row),
            mean_interval([end.bits_per_byte for end in ends]).show(),
            verdict(difference) if difference else "",
            f"{ends[0].tokens:,}",
            f"{seconds:,.0f}",
        ]

    @property
    def heading(self) -> str:
        """What was trained, and how often."""
        done = len(self.rows) * len(self.seeds) - len(self.missing)
        count = counted(self.sweep.seeds, "seed")
        rest = f"; {done} of {len(self.rows) * len(self.seeds)} runs done" if self.missing else ""
        return f"training {self.sweep.config.name} for {self.sweep.steps:,} steps, {count}{rest}"

    def remarks(self) -> list[str]:
        """Return the sentences below the table."""
        if self.sweep.seeds == 1:
            return ["One seed shows no difference that another seed could not undo: --seeds 3 adds the others."]
        return ["Intervals of 95 % (Student's t); differences are paired by seed."]

    def render(self, console: Console) -> None:
        """Print the table to a terminal."""
        table = text_table(self.heading, *TITLES)
        for row in self.cells():
            table.add_row(*map(escape, row))
        console.print(table)
        for sentence in self.remarks():
            console.print(sentence, markup=False, highlight=False)

    def markdown(self) -> str:
        """Return the table as Markdown."""
        return "\n".join([f"**{self.heading}**", "", *markdown_table(TITLES, self.cells()), "", *self.remarks(), ""])

    def to_dict(self) -> dict[str, Any]:
        """Return the record of these variants and seeds as JSON."""
        chosen = [cell for cell in self.record.cells if cell.settings in self.rows and cell.seed in self.seeds]
        return {
            "title": self.heading,
            "complete": not self.missing,
            "cells": [cell.model_dump(mode="json") for cell in chosen],
            "facts": self.record.facts,
        }


def verdict(difference: Interval) -> str:
    """Describe a paired difference of bits per byte."""
    if not math.isfinite(difference.low):
        return f"{difference.mean:+.4f} (one seed)"
    if not difference.excludes_zero:
        return f"{difference.show('+.4f')}: no difference shown"
    return f"{difference.show('+.4f')}: {'better' if difference.mean < 0 else 'worse'}"


def sweep_settings(sweep: Sweep, measure: MeasureLearning = measure_learning) -> Iterator[SweepResult]:
    """Do the runs that the record does not have yet.

    Args:
        sweep: What to compare.
        measure: Trains a configuration.

    Yields:
        The result so far: before the first run, and after each one.

    Raises:
        UsageError, ConfigError: See `Sweep.base_and_rows`; or the record is that of another configuration or text.
            Raised before anything is trained.
        DataError: The record, the text or the tokenizer is missing or unusable.
    """
    chosen, rows = sweep.base_and_rows()
    with open_study(for_learning(chosen, sweep.steps, POINTS), sweep.data, sweep.record, RECORDS) as study:
        result = SweepResult(sweep, rows, study.record)
        yield result
        started, total = time.monotonic(), len(result.missing)
        for done, (row, seed) in enumerate(result.missing, 1):
            config = with_overrides(study.config, row).replace({"train.seed": seed, "data.seed": seed})
            result.record = result.record.with_run(
                row, seed, partial(measure, config, study.folder, study.data), study.file
            )
            left = (time.monotonic() - started) / done * (total - done)
            end = result.record.cells[-1].describe()
            logger.info(f"run {done} of {total}, {variant_name(row)}, seed {seed}: {end}, about {left:.0f} s left")
            yield result
