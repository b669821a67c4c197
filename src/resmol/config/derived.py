"""Values that follow from others when one table of a configuration is laid over another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from resmol.config.tables import dotted, merged, nested
from resmol.errors import ConfigError

# Not a field: laid over a configuration, it sets batch.global_batch_tokens, and a micro-batch that divides it.
WINDOWS_PER_STEP = "batch.windows_per_step"


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return one table laid over another; another width brings its own standard deviation of the initial weights.

    That is so where the table below follows the rule ``initializer_range = 1/sqrt(hidden_size)`` and the one above does
    not state it.
    """
    table, before, stated = merged(below, above), dotted(below), dotted(above)
    old, new = before.get("model.hidden_size"), stated.get("model.hidden_size")
    spread = before.get("model.initializer_range")
    if "model.initializer_range" in stated or not (_is_size(old) and _is_size(new) and isinstance(spread, float)):
        return table
    return merged(table, {"model": {"initializer_range": new**-0.5}}) if math.isclose(spread, old**-0.5) else table


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


def with_changes(table: Mapping[str, Any], changes: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Lay changes over a table; windows per step become tokens, in micro-batches of the largest size that divides them.

    Args:
        table: Sections, or values by their keys.
        changes: Values named ``section.key``; `WINDOWS_PER_STEP` is one of them.
        sizes: The defaults of ``data.seq_len`` and ``batch.micro_batch_size``.

    Raises:
        ConfigError: The windows per step are no whole number, or the tokens are given as well.
    """
    if WINDOWS_PER_STEP not in changes:
        return laid_over(table, nested(changes))
    rest = {key: value for key, value in changes.items() if key != WINDOWS_PER_STEP}
    windows, tokens_key, micro_key = changes[WINDOWS_PER_STEP], "batch.global_batch_tokens", "batch.micro_batch_size"
    if type(windows) is not int or windows < 1:
        raise ConfigError(f"{WINDOWS_PER_STEP} is {windows}", fix="give a whole number of at least 1")
    if tokens_key in rest:
        raise ConfigError(f"{WINDOWS_PER_STEP} and {tokens_key} are both given", fix="leave one of them out")
    whole = laid_over(table, nested(rest))
    length = {**sizes, **dotted(whole)}["data.seq_len"]
    derived = {tokens_key: windows * length} if type(length) is int else {}
    micro = {**sizes, **dotted(whole)}[micro_key]
    if micro_key in rest and type(micro) is int and micro > 0 and windows % micro:
        raise ConfigError(
            f"{WINDOWS_PER_STEP} ({windows}) is not a multiple of {micro_key} ({micro})",
            fix=f"change one of them, or leave {micro_key} out: a size that fits is then taken",
        )
    if micro_key not in rest and type(micro) is int and micro > 0:
        derived[micro_key] = max(size for size in range(1, min(micro, windows) + 1) if windows % size == 0)
    return merged(whole, nested(derived))
