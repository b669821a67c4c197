"""Every command and option that a fix names exists; one of another command is said to be one."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

import resmol
from resmol.__main__ import run
from resmol.cli import app
from resmol.cli.fixes import USUAL_OPTIONS, command_of, complete_fix, options_of_commands
from resmol.config.load import load_preset, parse_overrides
from resmol.config.run_config import flatten

COMMANDS = options_of_commands(app)
SOURCES = sorted(Path(resmol.__file__).parent.rglob("*.py"))
WORD = "X"  # what a field of an f-string stands for


def text_of(node: ast.expr) -> str:
    """Return the text of an expression, with a word in the place of what is computed."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(WORD if isinstance(part, ast.FormattedValue) else text_of(part) for part in node.values)
    return " ".join(text_of(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))


def all_fixes() -> list[tuple[str, str]]:
    """Return every ``fix=`` of the package as (file:line, text)."""
    return [
        (f"{path.name}:{node.value.lineno}", text_of(node.value))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "fix"
    ]


FIXES = all_fixes()


def test_they_are_found() -> None:
    assert len(FIXES) > 200
    assert sum("--" in text for _, text in FIXES) > 40


def test_every_next_step_is_a_command_that_exists() -> None:
    calls = [
        node
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "suggest"
    ]
    lines = [text_of(node) for call in calls for node in ast.walk(call) if isinstance(node, ast.JoinedStr)]
    assert len(lines) > 10
    for line in lines:
        command = command_of(line.split(), COMMANDS)
        assert command, line
        assert set(re.findall(r"(?<!\S)--[a-z-]+", line)) <= COMMANDS[command], line


@pytest.mark.parametrize(("place", "text"), [fix for fix in FIXES if "resmol " in fix[1] or "--" in fix[1]])
def test_every_command_and_option_of_a_fix_exists(place: str, text: str) -> None:
    for line in re.findall(r"(?:`|: )resmol ([^`;]*)", text):
        command = command_of(line.split(), COMMANDS)
        assert command, f"{place}: there is no command `resmol {line}`"
        unknown = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", line)) - COMMANDS[command]
        assert not unknown, f"{place}: `resmol {command}` has no {unknown}"
    for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text):
        assert any(option in options for options in COMMANDS.values()), f"{place}: no command has {option}"


@pytest.mark.parametrize(
    ("fix", "command", "expected"),
    [
        ("name it: --encoding cp1252", "prepare", "name it: --encoding cp1252"),
        ("give --special-tokens as-text", "train", "give --special-tokens (of `resmol prepare`) as-text"),
        ("name it: --encoding cp1252", "", "name it: --encoding cp1252"),
        ("run `resmol prepare OUT --input TEXT`", "train", "run `resmol prepare OUT --input TEXT`"),
        ("give `resmol prepare` --val-fraction 0.1", "evaluate", "give `resmol prepare` --val-fraction 0.1"),
        ("name another --port", "bench train", "name another --port (of `resmol demo`)"),
    ],
)
def test_an_option_of_another_command_is_said_to_be_one(fix: str, command: str, expected: str) -> None:
    assert complete_fix(fix, command, COMMANDS) == expected


def test_the_command_line_says_it(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "bad.toml").write_text("[optimizer]\nlr = -1\n", encoding="utf-8")
    assert run(["verify", "--config", str(tmp_path / "bad.toml")], debug=False) == 2
    assert "--set (of `resmol " in capsys.readouterr().err
    assert run(["train", str(tmp_path / "run"), "--config", str(tmp_path / "bad.toml")], debug=False) == 2
    assert "--set;" in capsys.readouterr().err


@pytest.mark.parametrize("option", USUAL_OPTIONS)
def test_an_option_of_other_tools_is_answered_with_ours(option: str, capsys: Any) -> None:
    assert option not in COMMANDS["train"]
    assert run(["train", "r", option, "1"], debug=False) == 2
    fix = capsys.readouterr().err.partition("fix: ")[2]
    assert fix.strip() == f"give {USUAL_OPTIONS[option]}"
    for setting in re.findall(r"--set (\S+)", fix):
        changes = parse_overrides([setting])
        assert changes.keys() <= flatten(load_preset("nano")).keys()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "`resmol --help`"),
        (["train", "--nope"], "`resmol train --help`"),
        (["bench", "x"], "`resmol --help`"),
    ],
)
def test_the_help_that_fits(arguments: list[str], expected: str, capsys: Any) -> None:
    assert run(arguments, debug=False) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_a_command_without_words_shows_its_help_which_is_no_error(arguments: list[str], capsys: Any) -> None:
    assert run(arguments, debug=False) == 2
    assert capsys.readouterr().err.startswith("Usage: resmol")
    assert run([*arguments, "-h"], debug=False) == 0
