"""One check with its evidence: what verify, audit and reproduce all report."""

from __future__ import annotations

from collections.abc import Sequence
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


def all_passed(checks: Sequence[Check]) -> bool:
    """Tell whether every check passed; no checks at all is not a pass."""
    return bool(checks) and all(check.passed for check in checks)
