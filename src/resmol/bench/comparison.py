"""Variants that are measured in interleaved rounds, and the table of their results.

The first variant, the reference, is measured twice under two names: the difference between the two is noise. Ratios
are taken within a round and count only beyond that noise. The share of the roofline is taken within a round as well,
since the roofline is measured in each.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from resmol.bench.paired_stats import Ratio, interleaved, is_too_noisy, paired_ratio, verdict
from resmol.bench.workers.main import Metrics
from resmol.errors import CheckFailed
from resmol.system.tables import text_table

logger = logging.getLogger(__name__)

UNBOUNDED = 100.0  # an interval that reaches this far has no useful end
Kind = Literal["reference", "control", "other", "roofline"]


@dataclass(frozen=True)
class Quantity:
    """A column: the key of its values, its title, their format, and the unit that they are divided by first."""

    key: str
    title: str
    form: str = ",.0f"
    unit: float = 1.0

    def show(self, values: Sequence[float]) -> str:
        """Return the median with the smallest and the largest value."""
        low, middle, high = (
            format(value / self.unit, self.form) for value in (min(values), statistics.median(values), max(values))
        )
        return middle if low == high else f"{middle} ({low} to {high})"


SPEED = Quantity("tokens_per_second", "tokens/s")
MEMORY = Quantity("peak_bytes", "peak memory, MiB", unit=2.0**20)


@dataclass
class Variant:
    """A row: a name, a function that measures it once in a process of its own, and the metrics of each round."""

    name: str
    kind: Kind
    measure: Callable[[], Metrics]
    measurements: list[Metrics] = field(default_factory=list)
    failure: str = ""

    def values(self, key: str, rounds: int | None = None) -> list[float]:
        """Return a quantity of each round; empty if it was not measured."""
        return [float(metrics[key]) for metrics in self.measurements[:rounds] if metrics.get(key) is not None]


def make_variants(
    resmol: Callable[[], Metrics],
    baselines: Mapping[str, Callable[[], Metrics]],
    roofline: tuple[str, Callable[[], Metrics]] | None = None,
) -> list[Variant]:
    """Return the rows of a benchmark: resmol, resmol again as a control, the baselines, and the roofline.

    Args:
        resmol: Measures resmol once.
        baselines: The same for each baseline, by name.
        roofline: Name and measurement of the most that the machine allows. The memory of its process has no meaning
            and is left out.
    """
    rows = [Variant("resmol", "reference", resmol), Variant("control: resmol again", "control", resmol)]
    rows += [Variant(name, "other", measure) for name, measure in baselines.items()]
    if roofline is not None:
        name, measure = roofline
        rows.append(Variant(name, "roofline", lambda: {**measure(), "peak_bytes": None}))
    return rows


@dataclass
class Comparison:
    """Variants that do the same work.

    Attributes:
        title: The work.
        metric: The quantity that is compared.
        columns: Further quantities to show.
        variants: The rows; the reference is the first.
        facts: The machine, the versions, the sizes.
        more_is_better: Whether the metric is a speed, and not a time.
        inverted: A benchmark shows how many times as fast the reference is as each other variant; inverted, as an
            ablation shows it, how many times as fast each other variant is as the reference.
        notes: Returns sentences to print below the table, given the finished comparison.
        complete: Whether all rounds were measured.
    """

    title: str
    metric: Quantity
    columns: tuple[Quantity, ...]
    variants: list[Variant]
    facts: dict[str, Any]
    more_is_better: bool = True
    inverted: bool = False
    notes: Callable[[Comparison], list[str]] = lambda _comparison: []
    complete: bool = False

    def run(self, rounds: int, seed: int) -> None:
        """Measure every variant once a round, in another order each round; Ctrl-C ends it early, incomplete.

        A variant that fails is left out of the other rounds.

        Raises:
            CheckFailed: The reference or the roofline failed.
        """
        total, done, started = len(self.variants) * rounds, 0, time.monotonic()
        try:
            for number, order in enumerate(interleaved(len(self.variants), rounds, seed), 1):
                for index in order:
                    result = self._measure(self.variants[index])
                    done += 1
                    left = (time.monotonic() - started) / done * (total - done)
                    logger.info(f"round {number} of {rounds}, {result}, about {left:.0f} s left")
        except KeyboardInterrupt:
            logger.info("interrupted; the results so far follow")
            return
        self.complete = True

    def _measure(self, variant: Variant) -> str:
        """Measure a variant once and return a phrase about it."""
        if variant.failure:
            return f"{variant.name}: left out, since it failed"
        try:
            variant.measurements.append(variant.measure())
        except CheckFailed as error:
            if variant.kind != "other":
                raise
            variant.failure = error.what
            return f"{variant.name}: {error.what}"
        latest = variant.values(self.metric.key)[-1:]
        return f"{variant.name}: {self.metric.show(latest)} {self.metric.title}" if latest else variant.name

    @property
    def reference(self) -> Variant:
        """The variant that is compared with the others."""
        return self.variants[0]

    @property
    def rounds(self) -> int:
        """Rounds in which every variant that works was measured."""
        return min((len(one.measurements) for one in self.variants if not one.failure), default=0)

    def of_kind(self, kind: Kind) -> Variant | None:
        """Return the first variant of a kind."""
        return next((one for one in self.variants if one.kind == kind), None)

    def ratio(self, variant: Variant) -> Ratio | None:
        """Return how many times as fast one is as the other (see ``inverted``); None if they cannot be compared."""
        ours = self.reference.values(self.metric.key, self.rounds)
        theirs = variant.values(self.metric.key, self.rounds)
        if not ours or len(ours) != len(theirs) or min(*ours, *theirs) <= 0:
            return None
        return paired_ratio(ours, theirs) if self.more_is_better != self.inverted else paired_ratio(theirs, ours)

    @property
    def control(self) -> Ratio | None:
        """The ratio of the reference to itself, which is noise."""
        control = self.of_kind("control")
        return self.ratio(control) if control else None

    def share(self, variant: Variant) -> list[float]:
        """Return the share of the roofline that a variant reached in each round."""
        roofline = self.of_kind("roofline")
        if roofline is None or variant is roofline:
            return []
        pairs = zip(
            variant.values(self.metric.key, self.rounds), roofline.values(self.metric.key, self.rounds), strict=False
        )
        return [value / most if self.more_is_better else most / value for value, most in pairs]

    def verdict(self, variant: Variant) -> str:
        """Describe the ratio of a variant."""
        ratio = self.ratio(variant)
        if ratio is None or variant is self.reference or variant.kind == "roofline":
            return ""
        if variant.kind == "control":
            bounded = ratio.reach < math.log(UNBOUNDED)
            return f"noise: up to {100 * math.expm1(ratio.reach):.0f} %" if bounded else "noise: without bound"
        high = f"{ratio.high:.2f}" if ratio.high < UNBOUNDED else "any"
        text = f"{ratio.middle:.2f}x ({ratio.low:.2f} to {high})"
        return f"{text}: {verdict(ratio, self.control)}" if self.control else text

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Return the titles and the rows of the table."""
        roofline = self.of_kind("roofline")
        titles = ["", self.metric.title, *(column.title for column in self.columns)]
        titles += ["share of the roofline"] if roofline else []
        titles.append("against the first row" if self.inverted else "resmol against it")
        return titles, [self._row(variant, with_share=roofline is not None) for variant in self.variants]

    def _row(self, variant: Variant, *, with_share: bool) -> list[str]:
        row = [variant.name]
        for column in (self.metric, *self.columns):
            values = variant.values(column.key, self.rounds)
            row.append(column.show(values) if values else "")
        if with_share:
            shares = self.share(variant)
            row.append(f"{100 * statistics.median(shares):.0f} %" if shares else "")
        return [*row, f"failed: {variant.failure}" if variant.failure else self.verdict(variant)]

    def remarks(self) -> list[str]:
        """Return the sentences below the table."""
        noisy = self.control is not None and is_too_noisy(self.control)
        warning = ["The control differs from itself: this machine is too noisy for these rounds."] if noisy else []
        return [*(self.notes(self) if self.rounds else []), *warning]

    @property
    def heading(self) -> str:
        """The title, with the number of rounds."""
        count = f"{self.rounds} round{'' if self.rounds == 1 else 's'}"
        return f"{self.title}; {count}, interleaved" + ("" if self.complete else " (interrupted)")

    def render(self, console: Console) -> None:
        """Print the table to a terminal."""
        titles, rows = self.cells()
        table = text_table(self.heading, *titles)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for sentence in self.remarks():
            console.print(sentence, markup=False, highlight=False)

    def markdown(self) -> str:
        """Return the table as Markdown, with the facts below it."""
        titles, rows = self.cells()
        lines = [f"**{self.heading}**", "", *markdown_table(titles, rows), ""]
        facts = "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.facts.items())
        return "\n".join([*lines, *(f"{sentence}  " for sentence in self.remarks()), facts, ""])

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object with every single measurement."""
        rows = [
            {
                "name": one.name,
                "kind": one.kind,
                "measurements": one.measurements,
                "failure": one.failure or None,
                "ratio": _finite(asdict(ratio)) if (ratio := self.ratio(one)) else None,
                "share_of_roofline": self.share(one),
                "verdict": self.verdict(one),
            }
            for one in self.variants
        ]
        return {
            "title": self.title,
            "complete": self.complete,
            "rounds": self.rounds,
            "metric": self.metric.key,
            "ratio_is": "row / reference" if self.inverted else "reference / row",
            "rows": rows,
            "remarks": self.remarks(),
            "facts": self.facts,
        }


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    """Replace infinity, which JSON does not have, by None."""
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    bars = [["---"] * len(titles)]
    return [
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in [titles, *bars, *rows]
    ]
