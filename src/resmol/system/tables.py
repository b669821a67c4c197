"""Tables for people: one style, folded to a terminal, of free width and without trailing blanks anywhere else."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.table import Table
from rich.text import Text

FREE_WIDTH = 10_000  # columns where no terminal sets a limit: nothing is folded


def text_table(title: str, *columns: str) -> Table:
    """Return an empty table; what does not fit a line is folded, never cut. Titles are plain text, cells are markup."""
    table = _TableWithHeading(
        box=SIMPLE_HEAD,
        show_edge=False,
        show_header=any(columns),
        header_style="",
        padding=(0, 1),
        collapse_padding=True,
    )
    table.heading = title
    for column in columns:
        table.add_column(escape(column), overflow="fold")
    return table


def result_console() -> Console:
    """Return where results are printed: standard output."""
    if sys.stdout.isatty():
        return Console()
    return Console(file=_WithoutTrailingBlanks(sys.stdout), width=FREE_WIDTH)


class _TableWithHeading(Table):
    """A table whose title may be wider than itself; rich's own folds to the columns."""

    heading = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        yield Text(self.heading, style="bold")
        yield from super().__rich_console__(console, options)


class _WithoutTrailingBlanks(io.StringIO):
    """Passes whole lines on, each without the blanks that a table pads its last column with."""

    def __init__(self, target: Any) -> None:
        super().__init__()
        self._target = target

    def write(self, text: str) -> int:
        lines = text.split("\n")
        self._target.write("\n".join([*(line.rstrip() for line in lines[:-1]), lines[-1]]))
        return len(text)

    def flush(self) -> None:
        self._target.flush()
