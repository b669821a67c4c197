"""`~` is the home folder wherever a path is taken, and no folder of that name is ever made."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from tiny import synthetic_texts

import resmol
from resmol.__main__ import run
from resmol.cli.prompts import prompts_from
from resmol.config.run_config import RunConfig
from resmol.data.tokenizer import Tokenizer
from resmol.errors import UsageError
from resmol.run.directory import RunDir
from resmol.system.user_paths import default_cache, provide_home, user_path

FEW_STEPS = ("train.steps=2", "evaluation.every=0", "sampling.every=0")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a text, and a current folder that must stay empty."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "input.txt").write_text("\n".join(synthetic_texts(100)), encoding="utf-8")
    return home


def test_only_the_beginning_of_a_path_is_expanded(home: Path) -> None:
    assert user_path("~/a") == home / "a"
    assert user_path(Path("~")) == home
    assert user_path("~root/a") == Path(os.path.expanduser("~root/a"))  # noqa: PTH111
    for name in ("a/~/b", "/~", "~$letter.txt", "~nobody-has-this-name/a", "-", "."):
        assert user_path(name) == Path(name)


def test_without_a_home_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it answers where there is none
    with pytest.raises(UsageError, match="~/a cannot be found: there is no home folder"):
        user_path("~/a")
    assert user_path("a") == Path("a")


def test_without_a_home_there_is_a_folder_of_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    own = tmp_path / f"resmol-{os.getuid()}"
    assert default_cache() == own / ".cache" / "resmol"
    assert (own.stat().st_mode & 0o777, messages) == (0o700, [])
    environment = {"HOME": ""}
    provide_home(environment)
    assert environment == {"HOME": str(own)}
    assert "no home folder" in messages[0]
    provide_home(environment := {"XDG_CACHE_HOME": "/cache"})
    assert (environment, len(messages)) == ({"XDG_CACHE_HOME": "/cache"}, 1)
    own.rmdir()
    own.symlink_to(tmp_path / "elsewhere")  # somebody else's trap
    (tmp_path / "elsewhere").mkdir()
    assert not default_cache().is_relative_to(own)
    monkeypatch.undo()
    provide_home(environment := {"HOME": "/home/somebody"})
    assert environment == {"HOME": "/home/somebody"}


def test_the_variable_of_the_cache_is_a_path_like_others(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    assert default_cache() == home / "cache" / "resmol"


def test_python_expands_it_everywhere(
    home: Path, tiny_config: RunConfig, tiny_tokenizer: Tokenizer, own_cache: Path
) -> None:
    (home / "tokenizer.json").write_bytes(tiny_tokenizer.data)
    (home / "base.toml").write_text(tiny_config.to_toml(), encoding="utf-8")
    (home / "own.toml").write_text('base = "~/base.toml"\n[data]\npath = "~/run/data"\n', encoding="utf-8")
    (home / "prompts.txt").write_text("ka\n")
    config = resmol.load_config("~/own.toml")
    resmol.train_model(config, "~/run", data="~/input.txt", overrides=FEW_STEPS, tokenizer="~/tokenizer.json")
    assert (home / "run" / "checkpoints").is_dir()
    resmol.train_model(config, "~/again", overrides=FEW_STEPS, tokenizer="~/tokenizer.json")  # by its data.path
    assert resmol.load_model("~/run").source.step == 2
    assert resmol.evaluate_model("~/run", "~/run/data")["tokens"] > 0
    assert resmol.evaluate_model("~/again")["tokens"] > 0
    assert RunDir(Path("~/run")).exists()
    assert [prompt.text for prompt in prompts_from("~/prompts.txt")] == ["ka"]
    assert list(Path().iterdir()) == []


def test_commands_expand_what_no_shell_does(
    home: Path, tiny_config: RunConfig, tokenizer_in_cache: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "tiny.toml").write_text(tiny_config.to_toml(), encoding="utf-8")
    (home / "tokenizer.json").write_bytes(tokenizer_in_cache.data)
    hashed = f"--tokenizer-sha256={tokenizer_in_cache.sha256}"
    for command in (
        ["prepare", "~/data", "--input=~/input.txt", hashed],
        ["train", "~/run", "--config=~/tiny.toml", "--data=~/data", *(f"--set={field}" for field in FEW_STEPS)],
        ["inspect", "~/run"],
        ["evaluate", "~/run", "--data=~/data", "--windows=2"],
        ["audit", "~/run", "--certify"],
        ["report", "~/run", "--out=~/page.html"],
        ["report", "~/run", "--plot=~/loss.svg"],
    ):
        assert run(command, debug=False) == 0, (command, capsys.readouterr().err)
    made = {path.name for path in home.iterdir()}
    assert made >= {"data", "run", "page.html", "loss.svg"}
    assert json.loads((home / "run" / "certificate.json").read_text())
    assert list(Path().iterdir()) == []


def test_there_is_one_place_for_it() -> None:
    sources = Path(resmol.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if "expanduser(" in path.read_text(encoding="utf-8")] == ["user_paths.py"]
