"""`resmol ablate`: what a setting does to speed and memory, with intervals and a control.

What it does to learning takes whole runs over several seeds: sweep.py.

Tables of other reproductions have rows that differ by 20 to 42 % though their settings are the same. Here the first
variant is measured a second time under another name, and the difference between the two rows is the noise.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from resmol.bench.comparison import MEMORY, SPEED, Comparison, Quantity, Variant
from resmol.bench.machine import machine_facts
from resmol.bench.subprocess_runs import measure_training, prepared_folder
from resmol.bench.variants import (
    Overrides,
    base_and_factors,
    check_variants,
    combinations,
    parse_factor,
    variant_name,
)
from resmol.bench.workers.main import Metrics
from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.errors import UsageError
from resmol.train.autotune import resolve_auto

logger = logging.getLogger(__name__)

CONTROL = "control: the first row again"
LOSS = Quantity("loss", "loss", ".4f")
DEFAULT_FACTORS = (
    "runtime.attention=sdpa,eager", "runtime.precision=float32,bfloat16",
    "runtime.compile=off,on", "model.tie_word_embeddings=true,false",
)  # fmt: skip


@dataclass(frozen=True)
class Ablation:
    """What to compare.

    Attributes:
        config: The configuration whose other settings stay as they are.
        factors: ``key=a,b``: every combination of the values is a variant. Without any, each of `DEFAULT_FACTORS` is
            changed by itself. ``key=a`` is no factor, but laid over the configuration.
        data: A prepared folder or text; None takes the plays of Shakespeare.
        repeats: Rounds; each measures every variant once.
        steps: Timed steps of a measurement.
        warmup: Steps before them.
        seed: Seed of the order within the rounds.
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

    def base(self) -> RunConfig:
        """Return the configuration that the variants share (`ConfigError` when a value does not fit)."""
        return base_and_factors(self.config, self.factors)[0]

    def overrides(self) -> list[Overrides]:
        """Return the ``key=value`` of each variant.

        Raises:
            UsageError: A factor is not ``key=a,b``, or there are too many combinations.
            ConfigError: A variant is not a possible configuration; all of these are named.
        """
        base, factors = base_and_factors(self.config, self.factors)
        rows = combinations(factors) if factors else _one_at_a_time(base)
        check_variants(base, rows, least=2)
        return rows


def _one_at_a_time(config: RunConfig) -> list[Overrides]:
    """Return the unchanged configuration, and then each default factor changed by itself."""
    stored = config.model_dump(mode="json")
    rows: list[Overrides] = [()]
    for key, values in map(parse_factor, DEFAULT_FACTORS):
        section, name = key.split(".")
        current = str(stored[section][name]).lower()
        rows += [(f"{key}={value}",) for value in values if value != current]
    return rows


def ablate(ablation: Ablation, measure: Callable[..., Metrics] = measure_training) -> Comparison:
    """Measure every variant in interleaved rounds.

    Args:
        ablation: What to compare.
        measure: Takes (configuration, folder, prepared data, steps, warmup).

    Returns:
        The comparison; incomplete if Ctrl-C ended it.

    Raises:
        UsageError, ConfigError: See `Ablation.overrides`; raised before anything is measured.
        CheckFailed: The first variant failed.
    """
    rows = ablation.overrides()
    config, choices = resolve_auto(ablation.base())  # once, so that a choice cannot differ between rounds
    for sentence in choices:
        logger.info(sentence)
    with tempfile.TemporaryDirectory(prefix="resmol-ablate-") as name:
        folder = Path(name)
        data = prepared_folder(ablation.data, config, folder / "data")

        def measured(row: Overrides) -> Callable[[], Metrics]:
            variant = with_overrides(config, row)
            return lambda: measure(variant, folder, data, ablation.steps, ablation.warmup)

        first, *others = [(variant_name(row), measured(row)) for row in rows]
        comparison = Comparison(
            title=f"training {config.name}",
            metric=SPEED,
            columns=(MEMORY, LOSS),
            variants=[
                Variant(first[0], "reference", first[1]),
                *(Variant(name, "other", once) for name, once in others),
                Variant(CONTROL, "control", first[1]),
            ],
            facts=machine_facts(config.runtime.threads),
            inverted=True,
            notes=ablation_notes,
        )
        comparison.run(ablation.repeats, ablation.seed)
    return comparison


def ablation_notes(comparison: Comparison) -> list[str]:
    """Warn if the first variant and the control came to different losses in any round."""
    twice = (comparison.reference, comparison.of_kind("control"))
    bits = {metrics["loss_bits"] for variant in twice if variant for metrics in variant.measurements}
    return ["The first row and its control came to different losses: not deterministic."] if len(bits) > 1 else []
