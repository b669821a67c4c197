"""Tables: whole in a file, folded in a terminal, never cut."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from resmol.system.tables import result_console, text_table

LONG = "runs/quickstart/evidence/verify.json and " + "x" * 90


def one_row() -> Any:
    table = text_table("a title that is wider than its table [1]", "name", "value")
    table.add_row("see", LONG)
    return table


def test_a_terminal_folds_and_cuts_nothing() -> None:
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=True, no_color=True).print(one_row())
    lines = out.getvalue().splitlines()
    assert max(len(line.replace("\x1b[1m", "").replace("\x1b[0m", "")) for line in lines) <= 80
    assert "…" not in out.getvalue()
    assert "".join("".join(lines).split()).count("x") == 90


def test_a_file_gets_whole_lines_without_trailing_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    result_console().print(one_row())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a title that is wider than its table [1]"
    assert f" see   {LONG}" in lines
    assert [line for line in lines if line != line.rstrip()] == []
