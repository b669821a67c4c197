"""Nested tables of a configuration: one laid over another, values by ``section.key``, problems in words."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from resmol.errors import ConfigError
from resmol.system.wording import counted

RENAMED = {  # in configurations of version 0.1
    "runtime.products": "runtime.matmul_backend",
    "runtime.peer_timeout": "runtime.collective_timeout",
}
# Keys of which one is set: where a table is laid over another, its choice replaces the other one's.
ALTERNATIVES = {"beta2": "beta2_halflife_tokens", "beta2_halflife_tokens": "beta2"}


def merged(
    below: Mapping[str, Any], above: Mapping[str, Any], alternatives: Mapping[str, str] = ALTERNATIVES
) -> dict[str, Any]:
    """Return one table laid over another: a table in both is merged, any other value comes from ``above``."""
    table = {key: value for key, value in below.items() if alternatives.get(key) not in above}
    for key, value in above.items():
        inner, both = table.get(key), isinstance(value, dict)
        table[key] = merged(inner, value, alternatives) if isinstance(inner, dict) and both else value
    return table


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of some values that are named ``section.key``."""
    table: dict[str, Any] = {}
    for key, value in values.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        table = merged(table, value, alternatives={})  # these are one table: of alternatives both are kept, and refused
    return table


def dotted(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``section.key`` -> value; the inverse of `nested` for a table of sections."""
    flat: dict[str, Any] = {}
    for section, value in table.items():
        if isinstance(value, dict) and value:
            flat |= {f"{section}.{key}": inner for key, inner in value.items()}
        else:
            flat[section] = value
    return flat


def invalid(error: ValidationError, origin: str, known: Sequence[str]) -> ConfigError:
    """Return the error that lists all problems of a table.

    Args:
        error: What pydantic found.
        origin: Where the table comes from.
        known: The keys that there are; the nearest one is suggested for an unknown one.
    """
    problems = "\n".join(f"  - {_in_words(problem, known)}" for problem in error.errors())
    return ConfigError(
        f"the configuration ({origin}) has {counted(error.error_count(), 'problem')}:\n{problems}",
        fix="correct these values in the file or in --set; `resmol config --fields` describes every field",
    )


def _in_words(problem: ErrorDetails, known: Sequence[str]) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "sections disagree"
    if problem["type"] == "extra_forbidden":
        if where in RENAMED:
            return f"{where}: unknown key; since version 0.2 it is {RENAMED[where]}"
        nearest = difflib.get_close_matches(where, known, n=1)
        return f"{where}: unknown key" + (f"; did you mean {nearest[0]}?" if nearest else "")
    given = "" if problem["type"] in ("missing", "value_error") else f" (given: {problem['input']!r})"
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}{given}"
