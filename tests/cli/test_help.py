"""The help of every command: whole at 80 columns, plain words, examples that parse."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer

from resmol.__main__ import run
from resmol.cli import app
from resmol.cli.fixes import command_of, options_of_commands

ROOT: Any = typer.main.get_command(app)
COMMANDS = options_of_commands(app)
GROUPS = [name for name, command in ROOT.commands.items() if hasattr(command, "commands")]
NAMES = ["", *GROUPS, *COMMANDS]


def command_object(name: str) -> Any:
    found = ROOT
    for word in name.split():
        found = found.commands[word]
    return found


def help_of(name: str, columns: int, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run([*name.split(), "--help"], debug=True) == 0
    return str(capsys.readouterr().out)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_whole_at_80_columns_and_plain(name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of(name, 80, capsys, monkeypatch)
    assert [line for line in text.splitlines() if len(line) > 80 or line.endswith("...")] in ([], [text.split("\n")[0]])
    assert not re.findall(r"list\[|<str>|<int>|<path>|\{\w+\}|range>|--no-", text)
    assert [parameter.name for parameter in command_object(name).params if not parameter.help] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_wide_terminal_is_used(name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = (help_of(name, columns, capsys, monkeypatch) for columns in (80, 140))
    assert len(wide.splitlines()) <= len(narrow.splitlines())
    assert max(map(len, wide.splitlines())) <= 120
    if name in ("train", "generate"):
        assert len(wide.splitlines()) < len(narrow.splitlines())


def examples(name: str) -> list[str]:
    return [line.strip() for line in (command_object(name).epilog or "").strip().splitlines()]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_parse(name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2 <= len(examples(name)) <= 4
    shown = help_of(name, 80, capsys, monkeypatch)
    for line in examples(name):
        assert f"  {line}\n" in shown
        words = shlex.split(line.rpartition(" | ")[2].partition(" > ")[0])
        words = words[words.index("resmol") + 1 :]
        assert command_of(words, COMMANDS) == name
        given = words[len(name.split()) :]
        with command_object(name).make_context(name, list(given)) as context:
            assert context.params


def test_what_is_said_where_people_look_for_it(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in (
        ("inspect", ("TOML", "Run", "GGUF")),
        ("evaluate", ("GGUF",)),
        ("reproduce", ("smollm2-135m-cpu",)),
        ("audit", ("Seed of",)),
        ("train", ("--lr", "resmol config --fields", "Settings, each short for --set")),
    ):
        text = " ".join(help_of(name, 80, capsys, monkeypatch).split())
        assert [word for word in words if word not in text] == []
