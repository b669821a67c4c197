"""`resmol ablate`: what a setting does to speed, memory and loss, with intervals and a control.

Tables of other reproductions have rows that differ by 20 to 42 % though their settings are the same. Here the first
variant is measured a second time under another name, and the difference between the two rows is the noise.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from resmol.bench.comparison import MEMORY, SPEED, Comparison, Quantity, Variant
from resmol.bench.machine import machine_facts
from resmol.bench.subprocess_runs import measure_training, prepared_folder
from resmol.bench.workers.main import Metrics
from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.errors import ConfigError, UsageError
from resmol.system.wording import counted
from resmol.train.autotune import resolve_auto

logger = logging.getLogger(__name__)

MAX_VARIANTS = 32
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

    def _values(self) -> list[tuple[str, list[str]]]:
        return [_factor(text) for text in self.factors]

    def base(self) -> RunConfig:
        """Return the configuration that the variants share (`ConfigError` when a value does not fit)."""
        return with_overrides(self.config, [f"{key}={values[0]}" for key, values in self._values() if len(values) == 1])

    def overrides(self) -> list[tuple[str, ...]]:
        """Return the ``key=value`` of each variant.

        Raises:
            UsageError: A factor is not ``key=a,b``, or there are too many combinations.
            ConfigError: A variant is not a possible configuration; all of these are named.
        """
        base, factors = self.base(), [factor for factor in self._values() if len(factor[1]) > 1]
        rows = _combinations(factors) if factors else _one_at_a_time(base)
        if not 2 <= len(rows) <= MAX_VARIANTS:
            raise UsageError(
                f"that makes {counted(len(rows), 'variant')}",
                fix=f"give factors with 2 to {MAX_VARIANTS} combinations in all",
            )
        problems = []
        for row in rows:
            try:
                with_overrides(base, row)
            except ConfigError as error:
                problems.append(f"  - {', '.join(row)}: {error.what}")
        if problems:
            raise ConfigError("these variants are not possible:\n" + "\n".join(problems), fix="correct the factors")
        return rows


def _factor(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    if not equals or not all(values.split(",")):
        raise UsageError(f"--set {text!r} is no factor", fix="give --set key=a,b, or key=a for all variants")
    return key, values.split(",")


def _combinations(factors: Sequence[tuple[str, Sequence[str]]]) -> list[tuple[str, ...]]:
    return list(itertools.product(*([f"{key}={value}" for value in values] for key, values in factors)))


def _one_at_a_time(config: RunConfig) -> list[tuple[str, ...]]:
    """Return the unchanged configuration, and then each default factor changed by itself."""
    stored = config.model_dump(mode="json")
    rows: list[tuple[str, ...]] = [()]
    for key, values in map(_factor, DEFAULT_FACTORS):
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

        def measured(row: tuple[str, ...]) -> Callable[[], Metrics]:
            variant = with_overrides(config, row)
            return lambda: measure(variant, folder, data, ablation.steps, ablation.warmup)

        first, *others = [(", ".join(row) or "as configured", measured(row)) for row in rows]
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
