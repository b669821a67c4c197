"""One check with its evidence: what verify, audit and reproduce all report."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: What was looked at, in a few words.
        passed: Whether it holds.
        measured: What was found, for a person to read.
        expected: What had to be found; a tolerance says where it comes from.
        guards: The mistake that this check would catch.
        evidence: The file in which to look, where there is one.
    """

    name: str
    passed: bool
    measured: str
    expected: str
    guards: str = ""
    evidence: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the check as a JSON object."""
        return asdict(self)


class Checks(list[Check]):
    """Checks with their outcome; shown as a line in Python and as a table in a notebook."""

    @property
    def passed(self) -> bool:
        """Whether every check passed; no checks at all is not a pass."""
        return all_passed(self)

    def __repr__(self) -> str:
        failed = [check for check in self if not check.passed]
        lines = [f"  FAIL {check.name}: {check.measured} (expected: {check.expected})" for check in failed]
        return "\n".join([f"{len(self) - len(failed)} of {len(self)} checks passed", *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{'pass' if check.passed else '<b>FAIL</b>'}</td>"
            + "".join(f"<td>{html.escape(text)}</td>" for text in (check.name, check.measured, check.expected))
            + "</tr>"
            for check in self
        )
        return f"<table><tr><th></th><th>check</th><th>measured</th><th>expected</th></tr>{rows}</table>"


def check_problems(
    name: str, problems: Sequence[str], measured: str, expected: str, guards: str, evidence: str = ""
) -> Check:
    """Return a check that passes when there are no problems and shows the first ones when there are."""
    shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
    return Check(name, not problems, shown or measured, expected, guards, evidence)


def largest(values: Iterable[float]) -> float:
    """Return the largest of some numbers, or NaN if one of them is NaN: `max` drops those, and a check would pass."""
    listed = list(values)
    return math.nan if any(map(math.isnan, listed)) else max(listed)


def all_passed(checks: Sequence[Check]) -> bool:
    """Return whether every check passed; no checks at all is not a pass."""
    return bool(checks) and all(check.passed for check in checks)
