"""Contenders that take turns, and the table of what they did.

Ours is measured twice under two names: what the two differ by is noise. A ratio is taken within a round, and counts
only beyond that noise; the share of a limit is taken within a round as well, since the limit is measured in each.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resmol.bench.paired_stats import Ratio, is_too_noisy, paired_ratio, verdict
from resmol.bench.subprocess_runs import take_turns
from resmol.bench.workers.main import Metrics
from resmol.errors import CheckFailed

OURS, CONTROL = "resmol", "control: resmol again"
FAR = 100.0  # an interval that reaches this far says nothing
Kind = Literal["ours", "control", "peer", "limit"]


@dataclass(frozen=True)
class Quantity:
    """A column: a key of the measurements, its title, how a number is written, and by what it is divided first."""

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


MEMORY = Quantity("peak_bytes", "peak memory, MiB", unit=2.0**20)


@dataclass
class Variant:
    """A row: a name, what measures it once in a process of its own, and what came out of each round."""

    name: str
    kind: Kind
    measure: Callable[[], Metrics]
    measurements: list[Metrics] = field(default_factory=list)
    failure: str = ""

    def values(self, key: str, rounds: int | None = None) -> list[float]:
        """Return a quantity of each round; nothing where it was not measured."""
        return [float(numbers[key]) for numbers in self.measurements[:rounds] if numbers.get(key) is not None]


def variants(
    ours: Callable[[], Metrics],
    peers: Mapping[str, Callable[[], Metrics]],
    limit: tuple[str, Callable[[], Metrics]] | None = None,
) -> list[Variant]:
    """Return the rows of a comparison: ours, ours again as a control, the peers, and the limit.

    Args:
        ours: Measures ours once.
        peers: The same for each peer, by name.
        limit: Name and measurement of what the machine allows; its memory says nothing about the work, and is left out.
    """
    rows = [Variant(OURS, "ours", ours), Variant(CONTROL, "control", ours)]
    rows += [Variant(name, "peer", measure) for name, measure in peers.items()]
    if limit is not None:
        name, measure = limit
        rows.append(Variant(name, "limit", lambda: {**measure(), "peak_bytes": None}))
    return rows


@dataclass
class Comparison:
    """What is compared.

    Attributes:
        title: What all of them do.
        metric: The quantity that is compared.
        more_is_better: Whether it is a speed, and not a time.
        columns: The other quantities to show.
        variants_: Ours first.
        facts: The machine, the versions, the sizes.
        notes: Sentences below the table, made of the finished comparison.
        complete: Whether all rounds were measured.
    """

    title: str
    metric: Quantity
    columns: tuple[Quantity, ...]
    variants_: list[Variant]
    facts: dict[str, Any]
    more_is_better: bool = True
    notes: Callable[[Comparison], list[str]] = lambda _contest: []
    complete: bool = False

    def run(self, rounds: int, seed: int) -> None:
        """Measure every variant once a round; a peer that fails is not tried again, anything else that does ends it.

        Raises:
            CheckFailed: Ours, or the measurement of a limit, failed.
        """

        def once(index: int) -> str:
            variant = self.variants_[index]
            if variant.failure:
                return f"{variant.name}: left out, since it failed"
            try:
                variant.measurements.append(variant.measure())
            except CheckFailed as error:
                if variant.kind != "peer":
                    raise
                variant.failure = error.what
                return f"{variant.name}: {error.what}"
            latest = variant.values(self.metric.key)[-1:]
            return f"{variant.name}: {self.metric.show(latest)} {self.metric.title}" if latest else variant.name

        self.complete = take_turns(len(self.variants_), rounds, seed, once)

    @property
    def rounds(self) -> int:
        """Rounds in which every variant that works was measured."""
        return min((len(one.measurements) for one in self.variants_ if not one.failure), default=0)

    def of_kind(self, kind: Kind) -> Variant | None:
        """Return the first variant of a kind."""
        return next((one for one in self.variants_ if one.kind == kind), None)

    def ratio(self, other: Variant) -> Ratio | None:
        """Return how many times as fast ours is, with its interval; None where there is nothing to compare."""
        ours = self.variants_[0].values(self.metric.key, self.rounds)
        theirs = other.values(self.metric.key, self.rounds)
        if not ours or len(ours) != len(theirs) or min(*ours, *theirs) <= 0:
            return None
        return paired_ratio(ours, theirs) if self.more_is_better else paired_ratio(theirs, ours)

    def share(self, variant: Variant) -> list[float]:
        """Return the share of the limit that was reached, in each round."""
        limit = self.of_kind("limit")
        if limit is None or variant is limit:
            return []
        pairs = zip(
            variant.values(self.metric.key, self.rounds), limit.values(self.metric.key, self.rounds), strict=False
        )
        return [value / most if self.more_is_better else most / value for value, most in pairs]

    def verdict(self, variant: Variant) -> str:
        """Say in words how ours compares."""
        ratio, again = self.ratio(variant), self.of_kind("control")
        control = self.ratio(again) if again else None
        if ratio is None or variant is self.variants_[0] or variant.kind == "limit":
            return ""
        if variant.kind == "control":
            known = ratio.reach < math.log(FAR)
            return f"noise: up to {100 * math.expm1(ratio.reach):.0f} %" if known else "noise: without bound"
        high = f"{ratio.high:.2f}" if ratio.high < FAR else "any"
        words = f"{ratio.middle:.2f}x ({ratio.low:.2f} to {high})"
        return f"{words}: {verdict(ratio, control)}" if control else words

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Return the titles and the rows of the table."""
        limit = self.of_kind("limit")
        titles = ["", self.metric.title, *(column.title for column in self.columns)]
        titles += (["share of the limit"] if limit else []) + ["resmol against it"]
        return titles, [self._row(variant, with_share=limit is not None) for variant in self.variants_]

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
        again = self.of_kind("control")
        control = self.ratio(again) if again else None
        noisy = (
            ["The control differs from itself: this machine is too noisy for these rounds."]
            if control and is_too_noisy(control)
            else []
        )
        return [*(self.notes(self) if self.rounds else []), *noisy]

    @property
    def heading(self) -> str:
        """The title, with the number of rounds."""
        return f"{self.title}; {self.rounds} rounds, interleaved" + ("" if self.complete else " (interrupted)")

    def render(self, console: Console) -> None:
        """Print the table, for people."""
        titles, rows = self.cells()
        table = Table(*titles, title=escape(self.heading), title_justify="left")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for sentence in self.remarks():
            console.print(sentence, markup=False, highlight=False)

    def markdown(self) -> str:
        """Return the table as Markdown, with the machine below it."""
        titles, rows = self.cells()
        lines = [f"**{self.heading}**", "", *markdown_table(titles, rows), ""]
        facts = "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.facts.items())
        return "\n".join([*lines, *(f"{sentence}  " for sentence in self.remarks()), facts, ""])

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object with every single measurement."""
        rows = []
        for one in self.variants_:
            ratio = self.ratio(one)
            rows.append(
                {
                    "name": one.name,
                    "kind": one.kind,
                    "measurements": one.measurements,
                    "failure": one.failure or None,
                    "resmol_is_faster_by": _finite(asdict(ratio)) if ratio else None,
                    "share_of_limit": self.share(one),
                    "verdict": self.verdict(one),
                }
            )
        return {
            "title": self.title,
            "complete": self.complete,
            "rounds": self.rounds,
            "metric": self.metric.key,
            "rows": rows,
            "remarks": self.remarks(),
            "facts": self.facts,
        }


def _finite(numbers: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity: an interval without an end has None there."""
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    bars = [["---"] * len(titles)]
    return [
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in [titles, *bars, *rows]
    ]
