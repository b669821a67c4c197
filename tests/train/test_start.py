"""The Python interface: a model measured on any text, and other people's implementations found by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import TrainTiny

import resmol
from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import UsageError
from resmol.interop.evaluate import evaluate_model
from resmol.verify import verify_model
from resmol.verify.third_party.factory import import_factory


@pytest.fixture
def run(tmp_path: Path, train_tiny: TrainTiny) -> Path:
    train_tiny(tmp_path / "run", 10)
    return tmp_path / "run"


def test_every_public_name_is_there() -> None:
    assert all(getattr(resmol, name) is not None for name in resmol.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = resmol.nonsense


def test_a_run_is_measured_on_its_own_held_out_text(run: Path, tiny_dataset: Dataset) -> None:
    result = evaluate_model(run)
    assert result["tokens"] == len(tiny_dataset.val) - 1
    assert result["seq_len"] == 16
    assert result["split"] == "val"
    assert evaluate_model(run, windows=2)["tokens"] == 32


def test_a_checkpoint_is_measured_on_a_text_file(run: Path, tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    text = tmp_path / "some.txt"
    text.write_text("kalomi ner ta shu. " * 50, encoding="utf-8")
    result = evaluate_model(run / "checkpoints" / "step-00000010", str(text), seq_len=8)
    assert result["tokens"] == len(tiny_tokenizer.encode(text.read_text()))
    first = int(tiny_tokenizer.byte_lengths()[tiny_tokenizer.encode(text.read_text())[0]])
    assert result["bytes"] == len(text.read_bytes()) - first, "the first token is an input only"


def test_the_data_of_a_run_need_not_be_named_again(
    tmp_path: Path, tiny_config: RunConfig, tiny_dataset: Dataset, tiny_tokenizer: Tokenizer
) -> None:
    first = resmol.train_model(
        tiny_config,
        tmp_path / "run",
        data=str(tiny_dataset.root),
        tokenizer=tiny_tokenizer.path,
        overrides=["train.steps=3"],
    )
    again = resmol.train_model(tiny_config, tmp_path / "run", overrides=["train.steps=5"])
    assert (first.step, again.step) == (3, 5)


def test_a_run_that_made_its_own_data_can_be_moved(
    tmp_path: Path, tiny_config: RunConfig, tiny_tokenizer: Tokenizer
) -> None:
    text = tmp_path / "input.txt"
    text.write_text("kalomi ner ta shu. " * 400, encoding="utf-8")
    options = {"tokenizer": tiny_tokenizer.path, "overrides": ["train.steps=3"]}
    resmol.train_model(tiny_config, tmp_path / "run", data=str(text), **options)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert resmol.train_model(None, tmp_path / "moved", overrides=["train.steps=5"]).step == 5


def test_an_implementation_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_model.py").write_text("def build(config):\n    return config\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert import_factory("their_model:build")("x") == "x"


@pytest.mark.parametrize("name", ["no_such_module:build", "json:nothing", "json", "json:__name__"])
def test_an_implementation_that_is_not_there(name: str) -> None:
    with pytest.raises(UsageError, match="--model"):
        import_factory(name)


def test_a_name_map_must_be_one(tmp_path: Path, tiny_config: RunConfig) -> None:
    (tmp_path / "names.json").write_text('["a"]')
    with pytest.raises(UsageError, match="not a map of names"):
        verify_model(tiny_config.model, model="json:loads", names=tmp_path / "names.json")


def test_weights_of_a_run_are_verified_with_their_own_architecture(run: Path) -> None:
    names = {check.name for check in verify_model(resmol.load_preset("nano").model, weights=str(run)) if check.passed}
    assert {"logits", "gradients", "greedy tokens"} <= names


def test_a_model_with_rows_for_nothing_is_said_to_be_one(
    tmp_path: Path, train_tiny: TrainTiny, messages: list[str]
) -> None:
    train_tiny(tmp_path / "fits", 1, "sampling.every=0")
    assert not any("never occur" in line for line in messages)
    train_tiny(tmp_path / "wide", 1, "model.vocab_size=2048", "sampling.every=0")
    (line,) = [line for line in messages if "never occur" in line]
    assert "has 512 entries and the model 2,048" in line
    assert "--set model.vocab_size=512" in line
