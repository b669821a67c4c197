"""`resmol ablate`: what a setting does to speed, memory and loss, with intervals and a control.

Tables of other reproductions have rows that differ by 20-42 % though their settings are the same. Here the first
variant is measured a second time under another name; what those two rows differ by is noise, whatever its size.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resmol.bench.paired_stats import Ratio, is_too_noisy, paired_ratio, verdict
from resmol.bench.subprocess_runs import Measurement, measure_training, prepared_folder, take_turns
from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.errors import ConfigError, UsageError
from resmol.train.autotune import resolve_auto

logger = logging.getLogger(__name__)

MAX_VARIANTS = 32
CONTROL = "control: the first row again"
DEFAULT_FACTORS = (
    "runtime.attention=sdpa,eager", "runtime.precision=float32,bfloat16",
    "runtime.compile=off,on", "model.tie_word_embeddings=true,false",
)  # fmt: skip


@dataclass(frozen=True)
class Ablation:
    """What to compare.

    Attributes:
        config: The configuration that everything else stays at.
        factors: ``key=a,b``: every combination of the values is a variant; none takes the usual ones, one at a time.
        data: A prepared folder or text; None takes the plays of Shakespeare.
        repeats: Rounds; every variant is measured once in each.
        steps: Steps that are timed.
        warmup: Steps before them.
        seed: Of the order within the rounds.
    """

    config: RunConfig
    factors: tuple[str, ...] = ()
    data: str | None = None
    repeats: int = 5
    steps: int = 20
    warmup: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("repeats", 2), ("steps", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} is {getattr(self, name)}", fix=f"give at least {least}")


@dataclass
class Variant:
    """A row of the table."""

    name: str
    overrides: tuple[str, ...]
    measurements: list[Measurement] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each round."""
        return [measurement.tokens_per_second for measurement in self.measurements]


@dataclass(frozen=True)
class AblationResult:
    """The measured variants, the first of which the others are compared with; the last one is the control."""

    variants: list[Variant]
    complete: bool

    @property
    def rounds(self) -> int:
        """Rounds in which every variant was measured."""
        return min(len(variant.measurements) for variant in self.variants)

    def ratio(self, variant: Variant) -> Ratio:
        """Return the variant's speed as a multiple of the first one's."""
        return paired_ratio(variant.rates[: self.rounds], self.variants[0].rates[: self.rounds])

    @property
    def control(self) -> Ratio:
        """What the first variant shows against itself."""
        return self.ratio(self.variants[-1])

    @property
    def same_bits(self) -> bool:
        """Tell whether the first variant and the control came to the same loss, bit for bit, in every round."""
        return len({m.loss_bits for v in (self.variants[0], self.variants[-1]) for m in v.measurements}) == 1

    def verdict(self, variant: Variant) -> str:
        """Say in words what the variant's speed shows."""
        return verdict(self.ratio(variant), self.control)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object with every measurement."""
        rows = [
            {
                "name": variant.name,
                "overrides": list(variant.overrides),
                "measurements": [asdict(measurement) for measurement in variant.measurements],
                "ratio": asdict(self.ratio(variant)) if self.rounds else None,
                "verdict": self.verdict(variant) if self.rounds else None,
            }
            for variant in self.variants
        ]
        return {
            "complete": self.complete,
            "rounds": self.rounds,
            "control_has_the_same_bits": self.same_bits,
            "rows": rows,
        }

    def render(self, console: Console) -> None:
        """Print the table."""
        title = f"{self.rounds} rounds, interleaved" + ("" if self.complete else " (interrupted)")
        table = Table("variant", "tokens/s", "peak memory", "loss", "against the first row", title=title)
        for variant in self.variants if self.rounds else []:
            rates, last = variant.rates, variant.measurements[-1]
            words = "" if variant is self.variants[0] else self.verdict(variant)
            if variant is self.variants[-1]:
                words = f"noise of this machine: up to {100 * (math.exp(self.control.reach) - 1):.0f} %"
            table.add_row(
                escape(variant.name),
                f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})",
                f"{statistics.median(m.peak_bytes for m in variant.measurements) / 2**20:,.0f} MiB",
                f"{last.loss:.4f}",
                words,
            )
        console.print(table)
        if self.rounds and is_too_noisy(self.control):
            console.print("[bold red]The control differs from itself: this machine is too noisy for these repeats.[/]")
        if self.rounds and not self.same_bits:
            console.print("[bold red]The first row and its control came to different losses: not deterministic.[/]")


def variants_of(wanted: Ablation) -> list[Variant]:
    """Return the rows of the table, the control last.

    Raises:
        UsageError: A factor is no ``key=a,b``, or there are too many combinations.
        ConfigError: A variant is not a possible configuration; all are listed.
    """
    rows = _combinations(wanted.factors) if wanted.factors else _one_at_a_time(wanted.config)
    if not 2 <= len(rows) <= MAX_VARIANTS:
        raise UsageError(f"{len(rows)} variants", fix=f"give factors with 2 to {MAX_VARIANTS} combinations in all")
    problems = []
    for row in rows:
        try:
            with_overrides(wanted.config, row)
        except ConfigError as error:
            problems.append(f"  - {', '.join(row)}: {error.what}")
    if problems:
        raise ConfigError("these variants are not possible:\n" + "\n".join(problems), fix="correct the factors")
    variants = [Variant(", ".join(row) or "as configured", row) for row in rows]
    return [*variants, Variant(CONTROL, variants[0].overrides)]


def _combinations(factors: Sequence[str]) -> list[tuple[str, ...]]:
    choices = []
    for factor in factors:
        key, equals, values = factor.partition("=")
        if not equals or not all(values.split(",")):
            raise UsageError(f"--set {factor!r} is no factor", fix="give --set key=a,b with two values or more")
        choices.append([f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*choices))


def _one_at_a_time(config: RunConfig) -> list[tuple[str, ...]]:
    """Return the configuration as it is, and then each usual setting changed by itself."""
    stored = config.model_dump(mode="json")
    rows: list[tuple[str, ...]] = [()]
    for factor in DEFAULT_FACTORS:
        section, name = factor.partition("=")[0].split(".")
        current = str(stored[section][name]).lower()
        rows += [choice for choice in _combinations([factor]) if choice[0].partition("=")[2] != current]
    return rows


def ablate(wanted: Ablation, measure: Callable[..., Measurement] | None = None) -> AblationResult:
    """Measure every variant in interleaved rounds.

    Args:
        wanted: What to compare.
        measure: Takes (configuration, folder, prepared data, steps, warmup); by default `measure_training`.

    Returns:
        The result; incomplete when Ctrl-C ended it, with what was measured until then.

    Raises:
        UsageError, ConfigError: See `variants_of`.
        CheckFailed: A process failed.
    """
    measure = measure or measure_training
    variants = variants_of(wanted)  # everything that can be wrong is, before any time is spent
    settled, choices = resolve_auto(wanted.config)  # once: a choice that differs between rounds would be a variant
    for sentence in choices:
        logger.info(sentence)
    with tempfile.TemporaryDirectory(prefix="resmol-ablate-") as name:
        folder = Path(name)
        data = prepared_folder(wanted.data, wanted.config, folder / "data")

        def once(index: int) -> str:
            row = variants[index]
            config = with_overrides(settled, row.overrides)
            row.measurements.append(measure(config, folder, data, wanted.steps, wanted.warmup))
            return f"{row.name}: {row.rates[-1]:,.0f} tokens/s"

        complete = take_turns(len(variants), wanted.repeats, wanted.seed, once)
    return AblationResult(variants, complete)
