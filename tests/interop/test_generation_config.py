"""A text ends where transformers ends it: by generation_config.json, by config.json, at one token or at several."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import GGUF_CONFIG, hf_weights, reference, write_gguf

from resmol.errors import ConfigError
from resmol.interop.generation_config import text_ends
from resmol.interop.load import LoadedModel, load_model

PROMPT = "ka lo 12"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "hf"
    reference(vocab_size=512, initializer_range=0.5, max_position_embeddings=128).save_pretrained(folder)
    shutil.copy(tiny_tokenizer_file, folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "hf"))


def edit(path: Path, **changes: Any) -> None:
    table = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(table | changes))


def greedy(folder: Path) -> LoadedModel:
    return load_model(folder, device="cpu")


def ours(folder: Path) -> list[int]:
    done = load_model(folder, device="cpu").complete(PROMPT, temperature=0.0, max_new_tokens=24)
    batch = load_model(folder, device="cpu").complete_batch([PROMPT, "ka"], temperature=0.0, max_new_tokens=24)
    assert (batch[0].token_ids, batch[0].finish_reason) == (done.token_ids, done.finish_reason)
    return done.token_ids


def theirs(folder: Path) -> list[int]:
    """Without the token that ended the text, as ours."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0)[
        0, ids.shape[1] :
    ].tolist()
    ends = model.generation_config.eos_token_id
    return out[:-1] if out[-1] in (ends if isinstance(ends, list) else [ends]) else out


@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_a_text_ends_at_each_of_several_tokens(folder: Path, place: str) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    whole = ours(folder)
    assert whole == theirs(folder)
    assert len(whole) == 24
    later, first = whole[9], whole[4]
    edit(folder / place, eos_token_id=[later, first, 0])
    assert ours(folder) == theirs(folder) == whole[: whole.index(first)]
    assert greedy(folder).ends == (later, first, 0)
    edit(folder / place, eos_token_id=[first])
    assert ours(folder) == theirs(folder) == whole[: whole.index(first)]


def test_generation_config_counts_more_than_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    whole = ours(folder)
    edit(folder / "config.json", eos_token_id=whole[4])
    edit(folder / "generation_config.json", eos_token_id=whole[9])
    assert ours(folder) == theirs(folder) == whole[: whole.index(whole[9])]
    assert load_model(folder).config.eos_token_id == whole[4]  # config.json's own
    edit(folder / "config.json", eos_token_id=None)
    assert load_model(folder).config.eos_token_id == whole[9]


def test_config_counts_where_generation_config_names_no_end(folder: Path) -> None:
    edit(folder / "config.json", eos_token_id=[7, 3])
    for value in ({}, {"eos_token_id": None}):
        (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, **value}))
        assert greedy(folder).ends == (7, 3)


def test_a_model_without_an_end_says_so(folder: Path, messages: list[str]) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    edit(folder / "config.json", eos_token_id=None)
    loaded = greedy(folder)
    assert loaded.ends == ()
    assert loaded.complete(PROMPT, temperature=0.0, max_new_tokens=5).finish_reason == "length"
    assert any("name no token that ends a text" in line for line in messages)


@pytest.mark.parametrize("value", ["</s>", [], ["x"], 1.5, True, -1])
def test_an_end_that_is_no_token_is_refused(tmp_path: Path, value: Any) -> None:
    edit(tmp_path / "generation_config.json", eos_token_id=value)
    with pytest.raises(ConfigError, match="eos_token_id is"):
        text_ends(tmp_path, {"eos_token_id": 0})


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2')
    with pytest.raises(ConfigError, match=r"generation_config\.json is not sound JSON"):
        text_ends(tmp_path, {"eos_token_id": 0})


def test_what_a_file_asks_for_and_is_not_done_is_said(tmp_path: Path, messages: list[str]) -> None:
    edit(tmp_path / "generation_config.json", temperature=0.2, do_sample=True, repetition_penalty=1.0, num_beams=1)
    assert text_ends(tmp_path, {"eos_token_id": 0}) == (0,)
    assert not messages
    edit(tmp_path / "generation_config.json", repetition_penalty=1.3, suppress_tokens=[5])
    text_ends(tmp_path, {"eos_token_id": 0})
    assert len(messages) == 1
    assert "suppress_tokens [5]" in messages[0]
    assert "repetition_penalty 1.3" in messages[0]


def test_a_gguf_file_ends_at_the_end_of_a_turn_too(tmp_path: Path) -> None:
    changes = {"tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eot_token_id": 5}
    path = write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG), **changes)
    assert load_model(path).ends == (3, 5)
