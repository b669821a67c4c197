"""Hints name programs and packages that exist for this installation."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from resmol.__main__ import run
from resmol.system import installation
from resmol.system.installation import CHECKOUT, install_hint, program, started_as


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that Python runs from, which the shell does not search."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "resmol", "hf"):
        (folder / name).write_text("#!/bin/sh\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_program_is_named_so_that_the_shell_finds_it(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert program("hf") == "venv/bin/hf"
    monkeypatch.chdir("/")
    assert program("hf") == str(environment / "hf")
    monkeypatch.setenv("PATH", f"{environment}:/usr/bin")
    assert (program("hf"), started_as()) == ("hf", "resmol")


def test_another_program_of_that_name_is_not_ours(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = environment.parent.parent / "other"
    other.mkdir()
    (other / "hf").write_text("#!/bin/sh\n", encoding="utf-8")
    (other / "hf").chmod(0o755)
    monkeypatch.setenv("PATH", str(other))
    assert program("hf") == "venv/bin/hf"


def test_without_the_program_its_module_is_run(environment: Path) -> None:
    (environment / "resmol").unlink()
    assert started_as() == "venv/bin/python -m resmol"
    assert program("nonesuch") == "nonesuch"


def test_this_installation_s_own_command_runs() -> None:
    done = subprocess.run([*shlex.split(started_as()), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("resmol ")


def test_an_extra_comes_from_the_checkout_that_is_used_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    assert shlex.split(install_hint("demo"))[-2:] == ["-e", ".[demo]"]
    monkeypatch.chdir("/")
    assert shlex.split(install_hint("demo"))[-3:] == ["install", "-e", f"{CHECKOUT}[demo]"]


@pytest.mark.parametrize(
    ("record", "requirement"),
    [
        (None, "resmol[demo]"),
        ({"url": "file:///a%20b/resmol", "dir_info": {}}, "/a b/resmol[demo]"),
        ({"url": "file:///wheels/resmol-0.2.0-py3-none-any.whl", "archive_info": {}},
         "/wheels/resmol-0.2.0-py3-none-any.whl[demo]"),
        ({"url": "https://example.org/r.git", "vcs_info": {"vcs": "git", "commit_id": "0"}},
         "resmol[demo] @ git+https://example.org/r.git"),
    ],
)  # fmt: skip
def test_elsewhere_it_comes_from_where_the_package_came_from(
    record: Any, requirement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Found:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if record is None else json.dumps(record)

    monkeypatch.setattr(installation, "CHECKOUT", tmp_path)
    monkeypatch.setattr(installation, "distribution", lambda _name: Found())
    assert shlex.split(install_hint("demo"))[-2:] == ["install", requirement]


def test_no_message_and_no_page_asks_an_index_for_the_package() -> None:
    pages = [*(CHECKOUT / "src").rglob("*.py"), *(CHECKOUT / "docs").glob("*.md"), CHECKOUT / "README.md"]
    named = [page.name for page in pages if "resmol[" in page.read_text(encoding="utf-8")]
    assert named == [Path(installation.__file__).name]


def test_a_fix_is_typed_as_resmol_was_started(environment: Path, capsys: Any) -> None:
    assert run(["trian"], debug=False) == 2
    assert "see `venv/bin/resmol --help`" in capsys.readouterr().err
    assert run(["report", "nowhere"], debug=False) == 3
    assert "`venv/bin/resmol train` wrote" in capsys.readouterr().err
