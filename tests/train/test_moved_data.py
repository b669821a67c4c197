"""A run finds its data again where both were moved or copied, and never takes other data for it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import TrainTiny, synthetic_texts

from resmol.audit.audit import audit
from resmol.data.prepare import prepare
from resmol.data.readers import from_texts
from resmol.data.resolve import recorded_folder
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import ConfigError, DataError
from resmol.interop.evaluate import evaluate_model
from resmol.run.directory import RunDir
from resmol.train.start import train_model

Change = Callable[[Path, Path], object]


@pytest.fixture
def project(tmp_path: Path, train_tiny: TrainTiny, short_dataset: Dataset) -> Path:
    """A folder with a run of two steps and, elsewhere in it, the data that it was trained on."""
    folder = tmp_path / "here" / "project"
    shutil.copytree(short_dataset.root, folder / "other" / "data")
    train_tiny(folder / "runs" / "a", 2, "evaluation.every=0", "sampling.every=0", data=str(folder / "other" / "data"))
    return folder


def data_path(run: Path) -> str:
    return RunDir(run).load_config().data.path


def copy_and_lose(old: Path, new: Path) -> None:
    shutil.copytree(old, new)
    shutil.rmtree(old)


@pytest.mark.parametrize("change", [Path.rename, copy_and_lose], ids=["moved", "copied"])
def test_every_command_finds_what_moved_together(project: Path, tmp_path: Path, change: Change) -> None:
    before = evaluate_model(project / "runs" / "a")["loss"]
    (tmp_path / "there").mkdir()
    change(project, tmp_path / "there" / "renamed")
    run = tmp_path / "there" / "renamed" / "runs" / "a"
    assert recorded_folder(RunDir(run), data_path(run)) == tmp_path / "there" / "renamed" / "other" / "data"
    assert train_model(None, run, overrides=["train.steps=3"]).step == 3
    assert evaluate_model(run.parent / "a" / "checkpoints" / "step-00000002")["loss"] == before
    assert "recomputed" in next(check.measured for check in audit(RunDir(run)) if check.name == "data order")


def test_a_run_that_moves_alone_leaves_its_data_where_it_is(project: Path, tmp_path: Path) -> None:
    (project / "runs" / "a").rename(tmp_path / "b")
    assert train_model(None, tmp_path / "b", overrides=["train.steps=3"]).step == 3


@pytest.mark.parametrize(
    "stored", [r"C:\work\project\other\data", "D:/other/data", "../../other/data", "../other/data"]
)
def test_every_spelling_of_a_path_is_understood(project: Path, tiny_tokenizer: Tokenizer, stored: str) -> None:
    """Also that of Windows, in a run that was brought from there; other data of the same name is passed by."""
    prepare(project / "runs" / "data", from_texts(synthetic_texts(30, seed=7)), tiny_tokenizer)
    run = RunDir(project / "runs" / "a")
    found = recorded_folder(run, stored)
    assert found.resolve() == project / "other" / "data"


def test_a_path_that_was_given_as_relative_is_found_from_anywhere(
    project: Path, train_tiny: TrainTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    train_tiny(Path("runs/b"), 1, "sampling.every=0", data="other/data")
    monkeypatch.chdir(tmp_path)
    project.rename(tmp_path / "moved")
    assert train_model(None, tmp_path / "moved" / "runs" / "b", overrides=["train.steps=2"]).step == 2


def test_data_that_is_gone_can_be_named_again(project: Path, tmp_path: Path) -> None:
    run = project / "runs" / "a"
    (project / "other" / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"is not in .*other/data any more") as caught:
        train_model(None, run, overrides=["train.steps=3"])
    assert "--data PATH" in caught.value.fix
    assert train_model(None, run, data=str(tmp_path / "elsewhere"), overrides=["train.steps=3"]).step == 3
    assert data_path(run) == str(tmp_path / "elsewhere")


def test_other_data_never_passes_for_it(project: Path, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Neither in its place, nor by name; and what is named is not silently exchanged for what would fit."""
    other = prepare(tmp_path / "other", from_texts(synthetic_texts(30, seed=7)), tiny_tokenizer).root
    run = project / "runs" / "a"
    with pytest.raises(ConfigError, match="the data has fingerprint"):
        train_model(None, run, data=str(other), overrides=["train.steps=3"])
    shutil.rmtree(project / "other" / "data")
    shutil.copytree(other, project / "other" / "data")
    with pytest.raises(ConfigError, match="the data has fingerprint"):
        train_model(None, run, overrides=["train.steps=3"])


def test_the_log_says_where_it_was_found(project: Path, tmp_path: Path, messages: list[str]) -> None:
    project.rename(tmp_path / "moved")
    run = RunDir(tmp_path / "moved" / "runs" / "a")
    recorded_folder(run, data_path(run.path))
    (line,) = [line for line in messages if "does not hold the data" in line]
    assert re.search(r"moved/other/data does$", line)
