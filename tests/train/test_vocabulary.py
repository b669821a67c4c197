"""A tokenizer of one's own in one option: the configuration follows it, and a run keeps it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import synthetic_texts

from resmol.config.load import load_preset
from resmol.config.run_config import RunConfig
from resmol.data.prepare import prepare
from resmol.data.readers import from_texts
from resmol.data.tokenizer import Tokenizer
from resmol.errors import ConfigError, DataError
from resmol.interop.load import load_model
from resmol.run.directory import RunDir
from resmol.train.start import train_model
from resmol.train.vocabulary import Vocabulary, check_vocabulary, log_vocabulary, with_vocabulary

OF_A_PRESET = {"tokenizer.sha256": load_preset("nano").tokenizer.sha256, "model.vocab_size": 49_152}
Start = Callable[..., RunConfig]


@pytest.fixture
def preset(tiny_config: RunConfig) -> RunConfig:
    """The tiny run with the vocabulary of a preset."""
    return tiny_config.replace({**OF_A_PRESET, "evaluation.every": 0, "sampling.every": 0})


@pytest.fixture
def start(tmp_path: Path, preset: RunConfig) -> Start:
    """Start or resume a run of the preset on a text; return the configuration that it then has."""
    text = tmp_path / "input.txt"
    text.write_text("\n".join(synthetic_texts(60)), encoding="utf-8")

    def start_or_resume(steps: int = 1, *overrides: str, **options: object) -> RunConfig:
        wanted = {"config": preset, "data": str(text)} | options
        train_model(run=tmp_path / "run", overrides=[f"train.steps={steps}", *overrides], **wanted)
        return RunDir(tmp_path / "run").load_config()

    return start_or_resume


def altered(tokenizer: Tokenizer, entries: int, folder: Path, *, end: str = "<|endoftext|>") -> Path:
    """Write the file of a tokenizer with so many entries, in which another token may end a document."""
    document = json.loads(tokenizer.data.replace(b"<|endoftext|>", end.encode()))
    keep = {token: index for token, index in document["model"]["vocab"].items() if index < entries}
    merges = [merge for merge in document["model"]["merges"] if "".join(merge) in keep]
    document["model"] |= {"vocab": keep, "merges": merges}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def test_one_option_is_all(start: Start, tiny_tokenizer: Tokenizer, tmp_path: Path, messages: list[str]) -> None:
    """The hash is computed and kept, the number of rows fitted, and every command then knows the tokenizer."""
    folder = altered(tiny_tokenizer, 450, tmp_path / "own")
    config = start(1, tokenizer=str(folder))
    own = Tokenizer((folder / "tokenizer.json").read_bytes(), folder)
    assert (config.tokenizer.sha256, config.model.vocab_size) == (own.sha256, 512)
    assert any("tokenizer: 450 entries" in line and "vocab_size is 512" in line for line in messages)
    manifest = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    assert manifest["tokenizer"] == {"sha256": own.sha256, "vocab_size": 450, "eos_id": 0}
    shutil.rmtree(folder)
    assert start(2, config=None, data=None).train.steps == 2  # from the run's copy
    assert start(3).model.vocab_size == 512  # the preset again
    assert load_model(tmp_path / "run").tokenizer.sha256 == own.sha256


def test_another_tokenizer_is_another_run(start: Start, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    start(1, tokenizer=tiny_tokenizer.path)
    other = altered(tiny_tokenizer, 400, tmp_path / "other")
    with pytest.raises(ConfigError, match="was started with the tokenizer") as caught:
        start(2, tokenizer=other)
    assert "leave --tokenizer out" in caught.value.fix
    assert start(2, tokenizer=tiny_tokenizer.path).train.steps == 2


def test_the_hash_may_still_be_given_as_a_check(start: Start, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="the configuration asks for 0000"):
        start(1, f"tokenizer.sha256={'0' * 64}", tokenizer=tiny_tokenizer.path)
    pin = f"tokenizer.sha256={tiny_tokenizer.sha256}"
    assert start(1, pin, tokenizer=tiny_tokenizer.path).model.vocab_size == 512
    assert start(2, pin).model.vocab_size == 512


def test_a_size_that_the_user_set_stays_and_is_warned_of(
    start: Start, preset: RunConfig, tiny_tokenizer: Tokenizer, messages: list[str]
) -> None:
    assert start(1, "model.vocab_size=2048", tokenizer=tiny_tokenizer.path).model.vocab_size == 2048
    assert any("512 entries and the model 2,048" in line for line in messages)
    vocabulary = Vocabulary.of(tiny_tokenizer)
    mine = preset.replace({"model.vocab_size": 2048})
    assert with_vocabulary(mine, vocabulary).model.vocab_size == 2048
    kept = with_vocabulary(preset, vocabulary, ["model.vocab_size"])
    assert kept.model.vocab_size == 49_152
    log_vocabulary(kept, tiny_tokenizer)
    assert any("--set model.vocab_size=512" in line for line in messages)


def test_too_few_rows_are_refused_before_anything_is_prepared(
    start: Start, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"has 512 entries, and model\.vocab_size is 500") as caught:
        start(1, "model.vocab_size=500", tokenizer=tiny_tokenizer.path)
    assert "--set model.vocab_size=512" in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_the_end_comes_from_the_tokenizer(preset: RunConfig, tiny_tokenizer: Tokenizer) -> None:
    """Also where it is not the first token: the ids are those of its file, and a text begins after an end."""
    data = tiny_tokenizer.data.replace(b"<|endoftext|>", b"<|pad|>")
    document = json.loads(data)
    document["added_tokens"].append(document["added_tokens"][0] | {"id": 512, "content": "</s>"})
    own = Tokenizer(json.dumps(document).encode(), tiny_tokenizer.path)
    model = with_vocabulary(preset, Vocabulary.of(own)).model
    assert (model.vocab_size, model.eos_token_id, model.bos_token_id) == (576, 512, 512)
    with pytest.raises(ConfigError, match="ends documents with 512") as caught:
        check_vocabulary(
            with_vocabulary(preset, Vocabulary.of(tiny_tokenizer)).replace({"model.vocab_size": 576}), 513, 512
        )
    assert "--set model.eos_token_id=512" in caught.value.fix


def test_prepared_data_brings_its_tokenizer(
    start: Start, tokenizer_in_cache: Tokenizer, own_cache: Path, tmp_path: Path
) -> None:
    data = str(prepare(tmp_path / "data", from_texts(synthetic_texts(60)), tokenizer_in_cache).root)
    config = start(1, data=data)
    assert (config.tokenizer.sha256, config.model.vocab_size) == (tokenizer_in_cache.sha256, 512)
    shutil.rmtree(own_cache)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(DataError, match="is in the cache") as caught:
        start(1, data=data)
    assert "--tokenizer PATH" in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_smollm2_keeps_its_rows(genuine_tokenizer: Tokenizer) -> None:
    config = load_preset("nano")
    assert with_vocabulary(config, Vocabulary.of(genuine_tokenizer)) == config
    assert Vocabulary.of(genuine_tokenizer) == Vocabulary(config.tokenizer.sha256, 49_152, 49_152, 0, 0)
