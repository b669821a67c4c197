"""The variants of an ablation: every combination of the values of its factors, each checked before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.errors import ConfigError, UsageError
from resmol.system.wording import counted

MAX_VARIANTS = 32
AS_CONFIGURED = "as configured"

Overrides = tuple[str, ...]  # the ``key=value`` of a variant
Factor = tuple[str, list[str]]  # a key and its values


def parse_factor(text: str) -> Factor:
    """Return the key and the values of ``key=a,b`` (`UsageError` when it has none)."""
    key, equals, values = text.partition("=")
    if not equals or not all(values.split(",")):
        raise UsageError(f"--set {text!r} is no factor", fix="give --set key=a,b, or key=a for all variants")
    return key, values.split(",")


def base_and_factors(config: RunConfig, texts: Sequence[str]) -> tuple[RunConfig, list[Factor]]:
    """Return the configuration that the variants share, and their factors; a single value is no factor.

    Raises:
        UsageError: One of the texts is not ``key=a,b``.
        ConfigError: A single value does not fit the configuration.
    """
    parsed = [parse_factor(text) for text in texts]
    base = with_overrides(config, [f"{key}={values[0]}" for key, values in parsed if len(values) == 1])
    return base, [factor for factor in parsed if len(factor[1]) > 1]


def combinations(factors: Sequence[Factor]) -> list[Overrides]:
    """Return every combination of the factors' values."""
    return list(itertools.product(*([f"{key}={value}" for value in values] for key, values in factors)))


def check_variants(base: RunConfig, rows: Sequence[Overrides], least: int) -> None:
    """Check how many variants there are, and each of them.

    Args:
        base: What the variants share.
        rows: The variants.
        least: How few of them make sense.

    Raises:
        UsageError: There are too few or too many.
        ConfigError: Some are no possible configuration; all of these are named.
    """
    if not least <= len(rows) <= MAX_VARIANTS:
        raise UsageError(
            f"that makes {counted(len(rows), 'variant')}",
            fix=f"give factors with {least} to {MAX_VARIANTS} combinations in all",
        )
    problems = []
    for row in rows:
        try:
            with_overrides(base, row)
        except ConfigError as error:
            problems.append(f"  - {variant_name(row)}: {error.what}")
    if problems:
        raise ConfigError("these variants are not possible:\n" + "\n".join(problems), fix="correct the factors")


def variant_name(row: Overrides) -> str:
    """Return the settings of a variant in one line."""
    return ", ".join(row) or AS_CONFIGURED
