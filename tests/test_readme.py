"""What the README says is there is there, and its commands exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from resmol.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOUSE = README.partition("## Read the code")[2]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(language: str, page: str = README) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [block for name, block in blocks if name == language]


def commands() -> list[tuple[str, str]]:
    """Every command line that a page shows, with the name of the page."""
    found = []
    for path in PAGES:
        blocks = "\n".join(code_blocks("", path.read_text(encoding="utf-8"))).replace("\\\n", " ")
        lines = [line.partition(" #")[0].strip() for line in blocks.splitlines()]
        found += [(path.stem, line.rpartition(" && ")[2]) for line in lines if re.match(r"(cd \S+ && )?resmol ", line)]
    return found


def test_the_tree_names_every_folder_and_the_files_to_start_with() -> None:
    package = ROOT / "src" / "resmol"
    named = re.findall(r"^  (\w+)/ ", HOUSE, re.MULTILINE)
    assert sorted(named) == sorted(path.parent.name for path in package.glob("*/__init__.py"))
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ][0]
    order = [name.strip() for layer in reversed(contract["layers"]) for name in layer.split(":")]
    rank = {
        name: number for number, layer in enumerate(reversed(contract["layers"])) for name in re.split(r" [:|] ", layer)
    }
    assert [rank[name] for name in named] == sorted(rank[name] for name in named), (
        f"the order of the contract is {order}"
    )
    files = re.findall(r"`(\w+/\w+\.py)`", HOUSE)
    assert files
    assert [name for name in files if not (package / name).is_file()] == []


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert [target for target in targets if not target.startswith("http") and not (ROOT / target).exists()] == []


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_of_the_pages_parse(page: str, line: str) -> None:
    command: Any = get_command(app)
    name, *words = (word for word in shlex.split(line) if word != "--help")
    while words and hasattr(command, "commands"):
        name, *words = words
        assert name in command.commands, f"{page}: there is no command {name}"
        command = command.commands[name]
    command.make_context(name, words, resilient_parsing=not words)


def test_every_command_is_listed() -> None:
    listed = set(re.findall(r"^\| `resmol (\w+)", README, re.MULTILINE))
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert listed == commands | {group.name for group in app.registered_groups}


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(code_blocks("")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_python_example_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    genuine_tokenizer: object,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text("Once upon a time there was a king. " * 200, encoding="utf-8")
    example = code_blocks("python")[0].replace("train.steps=200", "train.steps=2")
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
