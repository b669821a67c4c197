"""Runs the tests of the mistakes, and prints what caught each one as a table; it must not import the package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).resolve().parents[1] / "test_mistakes.py"


class _Caught:
    """Collects what the tests found, for the table."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, list[str], bool]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.rows += [(*value, report.passed) for name, value in report.user_properties if name == "mistake"]


def main(options: list[str]) -> int:
    """Run the tests and print the table."""
    caught = _Caught()
    code = pytest.main([str(TESTS), "-q", "--no-header", *options], plugins=[caught])
    table = Table("row", "mistake", "caught by", "", title="mistakes of other reproductions, put into ours")
    for row, words, found, passed in caught.rows:
        table.add_row(str(row), words, "; ".join(found), "[green]caught[/]" if passed else "[bold red]MISSED[/]")
    Console().print(table)
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
