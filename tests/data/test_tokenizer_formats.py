"""A tokenizer that is built from other formats gives the ids of transformers for the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer

from resmol.data.tokenizer import Tokenizer
from resmol.data.tokenizer_formats import (
    tokenizer_json_from_metadata,
    tokenizer_json_from_vocab,
    with_tokens_around,
)
from resmol.errors import DataError

TEXTS = ["ka lo", " ka  lo12 \n\n", "it's 2024, ü<|endoftext|>ka", "", "\tIT'S ka", "1234 56"]


def vocabulary(tokenizer: Tokenizer) -> tuple[dict[str, int], str]:
    """The contents of vocab.json and merges.txt, as transformers 4 wrote them."""
    model = json.loads(tokenizer.data)["model"]
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return model["vocab"], "#version: 0.2\n" + "\n".join(pairs) + "\n"


def write(folder: Path, tokenizer: Tokenizer, **stated: Any) -> None:
    words, merges = vocabulary(tokenizer)
    (folder / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"} | stated))


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"add_prefix_space": True},
        {"add_bos_token": True},
        {"add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": "ka"}, "add_eos_token": True},
        {"pad_token": "Ġka", "additional_special_tokens": ["lo"]},
        {"added_tokens_decoder": {"0": {"content": "<|endoftext|>", "lstrip": True, "rstrip": True, "special": True}}},
    ],
)
def test_vocab_and_merges_give_the_ids_of_transformers(
    stated: dict[str, Any], tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    words, _ = vocabulary(tiny_tokenizer)
    stated = {key: value for key, value in stated.items() if key != "pad_token" or value in words}
    write(tmp_path, tiny_tokenizer, **stated)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    data = tokenizer_json_from_vocab(*vocabulary(tiny_tokenizer), stated, {}, tmp_path)
    ours = Tokenizer(data, tmp_path, adds_special_tokens=True)
    assert ours.encode_prompts(TEXTS) == [theirs(text)["input_ids"] for text in TEXTS]
    assert ours.encode(TEXTS[0]) == theirs(TEXTS[0], add_special_tokens=False)["input_ids"]


def test_a_vocabulary_that_is_none_is_refused(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    words, merges = vocabulary(tiny_tokenizer)
    for changed in (words | {"x": "7"}, words | {"x": -1}, words | {"x": True}):
        with pytest.raises(DataError, match="does not give every token a number"):
            tokenizer_json_from_vocab(changed, merges, {}, {}, tmp_path)
    with pytest.raises(DataError, match="not a pair"):
        tokenizer_json_from_vocab(words, merges + "a b c\n", {}, {}, tmp_path)
    with pytest.raises(DataError, match="bos_token '<s>' to a text, which is no token"):
        tokenizer_json_from_vocab(words, merges, {"add_bos_token": True, "bos_token": "<s>"}, {}, tmp_path)


def metadata(tokenizer: Tokenizer, pre: str, /, **changes: Any) -> dict[str, Any]:
    words, merges = vocabulary(tokenizer)
    tokens = sorted(words, key=words.__getitem__)
    kinds = [3 if token == "<|endoftext|>" else 1 for token in tokens]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges.splitlines()[1:]}
    return {f"tokenizer.ggml.{name}": value for name, value in (fields | changes).items()}


def test_a_gguf_file_gives_the_ids_of_the_tokenizer_that_it_was_written_from(tiny_tokenizer: Tokenizer) -> None:
    data = tokenizer_json_from_metadata(metadata(tiny_tokenizer, "smollm"), Path("x.gguf"))
    assert Tokenizer(data, Path("x.gguf")).encode_batch(TEXTS) == tiny_tokenizer.encode_batch(TEXTS)


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "it's 1234", ["it", "'s", "Ġ1234"]),
        ("smollm", "it's 12", ["it", "'s", "Ġ", "1", "2"]),
        ("llama-bpe", "IT'S 1234\n\nü", ["IT", "'S", "Ġ", "123", "4", "ĊĊ", "Ã¼"]),
    ],
)
def test_the_rules_for_words(pre: str, text: str, words: list[str], tiny_tokenizer: Tokenizer) -> None:
    """By hand, from the regular expressions of llama.cpp."""
    data = tokenizer_json_from_metadata(metadata(tiny_tokenizer, pre), Path("x.gguf"))
    cut = RustTokenizer.from_str(data.decode()).pre_tokenizer.pre_tokenize_str(text)
    assert [word for word, _ in cut] == words


def test_tokens_that_are_not_used_are_none(tiny_tokenizer: Tokenizer) -> None:
    words, _ = vocabulary(tiny_tokenizer)
    tokens = [*sorted(words, key=words.__getitem__), "<user>", "[PAD513]"]
    changes = {"tokens": tokens, "token_type": [3, *[1] * 511, 4, 5]}
    data = tokenizer_json_from_metadata(metadata(tiny_tokenizer, "smollm", **changes), Path("x.gguf"))
    found = Tokenizer(data, Path("x.gguf"))
    assert found.encode("ka<user>")[-1] == 512
    assert list(found.special_tokens) == [0]
    assert (found.vocab_size, found.spelling(513)) == (513, None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pre": "qwen2"}, "its rule for words, 'qwen2', is not implemented"),
        ({"pre": None}, "its rule for words, 'None'"),
        ({"pre": ["smollm"]}, "its rule for words"),
        ({"model": "llama"}, "its tokenizer 'llama' is no byte-level BPE"),
        ({"merges": None}, "no byte-level BPE with merges"),
        ({"tokens": [1, 2]}, "no byte-level BPE with merges"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_way_out(
    changes: dict[str, Any], expected: str, tiny_tokenizer: Tokenizer
) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        tokenizer_json_from_metadata(metadata(tiny_tokenizer, "smollm", **changes), Path("m/x.gguf"))
    assert "tokenizer.json into m, or name it with --tokenizer PATH" in caught.value.fix


def test_tokens_around_a_text_are_set_and_taken_away(tiny_tokenizer: Tokenizer) -> None:
    both = with_tokens_around(tiny_tokenizer.data, [("<|endoftext|>", 0)], [("<|endoftext|>", 0)])
    changed = Tokenizer(both, Path("x"), adds_special_tokens=True)
    plain = tiny_tokenizer.encode("ka lo")
    assert changed.encode_prompts(["ka lo", ""]) == [[0, *plain, 0], [0, 0]]
    assert changed.around() == ([0], [0])
    assert changed.document_start == [0]
    assert changed.encode("ka lo") == plain
    assert Tokenizer(both, Path("x")).encode_prompts(["ka lo"]) == [plain]  # as training reads it
    assert Tokenizer(both, Path("x")).document_start == []
    assert Tokenizer(with_tokens_around(both, [], []), Path("x"), adds_special_tokens=True).around() == ([], [])
    assert changed.with_special_tokens_as_text().adds_special_tokens
