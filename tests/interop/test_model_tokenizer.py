"""Which tokenizer a model gets when none is named, and the ids of a prompt: those of transformers for the folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import GGUF_CONFIG, hf_weights, reference, write_gguf
from tiny import TrainTiny
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import processors

from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError, UsageError
from resmol.interop import model_tokenizer
from resmol.interop.gguf_header import read_gguf_header
from resmol.interop.load import load_model
from resmol.interop.resolve import resolve


def test_without_a_tokenizer_of_its_own_a_model_of_another_size_does_not_get_smollm2s(tmp_path: Path) -> None:
    """Llama's 128,256 tokens were read with SmolLM2's 49,152: fluent nonsense, and no word about it."""
    reference(vocab_size=50_000).save_pretrained(tmp_path / "hf")
    path = write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG))
    for source in (tmp_path / "hf", path):
        loaded = load_model(source)
        with pytest.raises(DataError, match=r"holds no tokenizer\.json, and SmolLM2's is another") as caught:
            _ = loaded.tokenizer
        assert "put the model's tokenizer.json beside the weights" in caught.value.fix


def test_without_a_tokenizer_of_its_own_a_model_of_smollm2s_size_gets_it(
    tmp_path: Path, genuine_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GGUF file only if the tokens in its header are the same."""
    monkeypatch.setattr(model_tokenizer, "load_tokenizer", lambda **_: genuine_tokenizer)
    reference(vocab_size=49_152).save_pretrained(tmp_path / "hf")
    assert load_model(tmp_path / "hf").tokenizer is genuine_tokenizer
    vocabulary = RustTokenizer.from_str(genuine_tokenizer.data.decode())
    tokens = [vocabulary.id_to_token(index) for index in range(49_152)]
    config = GGUF_CONFIG.model_copy(update={"vocab_size": 49_152, "hidden_size": 12})
    weights = hf_weights(config)
    key = "tokenizer.ggml.tokens"
    assert load_model(write_gguf(tmp_path / "a.gguf", config, weights, **{key: tokens})).tokenizer is genuine_tokenizer
    assert load_model(write_gguf(tmp_path / "b.gguf", config, weights)).tokenizer is genuine_tokenizer
    tokens[17], tokens[18] = tokens[18], tokens[17]
    other = load_model(write_gguf(tmp_path / "c.gguf", config, weights, **{key: tokens}))
    with pytest.raises(DataError, match="no byte-level BPE with merges"):
        _ = other.tokenizer


# --- what a tokenizer adds around a text -----------------------------------------------------------------------


PROMPTS = ["ka lo 12", "", " ka"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of transformers without a tokenizer."""
    reference(vocab_size=512, initializer_range=0.5).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def with_template(tokenizer: Tokenizer, before: str = "<|endoftext|>", after: str = "") -> bytes:
    """A tokenizer.json whose post-processor adds tokens, written by the tokenizers library."""
    rust = RustTokenizer.from_str(tokenizer.data.decode())
    named = [(name, rust.token_to_id(name)) for name in (before, after) if name]
    rust.post_processor = processors.TemplateProcessing(single=f"{before} $A {after}".strip(), special_tokens=named)
    return rust.to_str().encode()


def theirs(folder: Path, **options: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and greedy tokens of transformers for each prompt that is not empty."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"] or [0]
        inputs = torch.tensor([ids])
        attention = torch.ones_like(inputs)
        out = model.generate(inputs, attention_mask=attention, max_new_tokens=8, do_sample=False, pad_token_id=0)
        found.append((ids, out[0, len(ids) :].tolist()))
    return found


def ours(source: Path, **options: Any) -> list[tuple[list[int], list[int]]]:
    loaded = load_model(source, device="cpu", **options)
    loaded = replace(loaded, source=replace(loaded.source, ends=()))
    done = [loaded.complete(prompt, temperature=0.0, max_new_tokens=8) for prompt in PROMPTS]
    batch = loaded.complete_batch(PROMPTS, temperature=0.0, max_new_tokens=8)
    assert [one.prompt_ids for one in batch] == [one.prompt_ids for one in done]
    return [(one.prompt_ids, one.token_ids) for one in done]


@pytest.mark.parametrize("after", ["", "ka"])
def test_a_prompt_begins_as_the_post_processor_says(folder: Path, tiny_tokenizer: Tokenizer, after: str) -> None:
    (folder / "tokenizer.json").write_bytes(with_template(tiny_tokenizer, after=after))
    found = ours(folder)
    assert found == theirs(folder)
    assert found[0][0][0] == 0
    (folder / "tokenizer.json").write_bytes(tiny_tokenizer.data)
    assert ours(folder) == theirs(folder) != found


@pytest.mark.parametrize(
    "stated",
    [
        {"pad_token": "ka"},
        {"eos_token": {"__type": "AddedToken", "content": "lo"}, "additional_special_tokens": ["mi"]},
        {"split_special_tokens": True},
        {"add_bos_token": True, "bos_token": "<|endoftext|>"},  # which transformers leaves to the tokenizer.json
    ],
)
def test_tokenizer_config_decides_what_is_a_control_token(
    folder: Path, tiny_tokenizer: Tokenizer, stated: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    (folder / "tokenizer.json").write_bytes(tiny_tokenizer.data)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **stated}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    reader = AutoTokenizer.from_pretrained(folder)
    texts = ["kalomi ka lo<|endoftext|>12 mi", "lolo"]
    found = load_model(folder).tokenizer
    assert found.encode_prompts(texts) == [reader(text)["input_ids"] for text in texts]
    changes = found.encode(texts[0]) != tiny_tokenizer.encode(texts[0])
    assert changes == ("add_bos_token" not in stated)


@pytest.mark.parametrize("add_bos", [None, False, True])
def test_vocab_and_merges_are_the_tokenizer_of_the_folder(
    folder: Path, tiny_tokenizer: Tokenizer, add_bos: bool | None
) -> None:
    model = json.loads(tiny_tokenizer.data)["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]))
    stated = {"tokenizer_class": "GPT2Tokenizer"} | ({} if add_bos is None else {"add_bos_token": add_bos})
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    found = ours(folder)
    assert found == theirs(folder)
    assert (found[0][0][0] == 0) == bool(add_bos)
    other = folder.with_name("tokenizer")
    other.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(folder / name, other)
    assert load_model(folder, tokenizer=other).tokenizer.encode("ka") == load_model(folder).tokenizer.encode("ka")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer.model": ""}, r"a tokenizer only as tokenizer\.model"),
        ({"vocab.json": "{}"}, r"a tokenizer only as vocab\.json"),
        ({"vocab.json": "{}", "merges.txt": ""}, "merges.txt without a tokenizer_class"),
        (
            {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}'},
            "of the class Qwen2Tokenizer",
        ),
    ],
)
def test_a_tokenizer_that_is_not_read_is_never_replaced(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    """A model of SmolLM2's size got SmolLM2's tokenizer: other ids, fluent nonsense, and no word about it."""
    reference(vocab_size=49_152).save_pretrained(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=expected) as caught:
        _ = load_model(tmp_path).tokenizer
    assert "--tokenizer OTHER" in caught.value.fix


def test_a_model_that_was_trained_here_gets_nothing_added(
    train_tiny: TrainTiny, tiny_tokenizer: Tokenizer, tiny_dataset: Any, tmp_path: Path, own_cache: Path
) -> None:
    """Whatever its tokenizer's post-processor says: training adds nothing, so the model never saw it."""
    train_tiny(tmp_path / "run", 5)
    other = tmp_path / "tokenizer.json"
    other.write_bytes(with_template(tiny_tokenizer))
    loaded = load_model(tmp_path / "run", tokenizer=other)
    assert loaded.tokenizer.around() == ([0], [])
    assert loaded.complete("ka", max_new_tokens=1).prompt_ids == tiny_tokenizer.encode("ka")


def test_a_byte_order_mark_is_no_part_of_a_tokenizer(folder: Path, tiny_tokenizer: Tokenizer) -> None:
    (folder / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + tiny_tokenizer.data)
    assert load_model(folder).tokenizer.data == tiny_tokenizer.data


def test_an_end_token_of_another_name_is_the_configurations(folder: Path, tiny_tokenizer: Tokenizer) -> None:
    renamed = tiny_tokenizer.data.replace(b"<|endoftext|>", b"<|end_of_all|>")
    (folder / "tokenizer.json").write_bytes(renamed)
    assert load_model(folder).tokenizer.eos_id == 0


def test_added_tokens_without_a_row_are_said_and_refused_in_a_text(
    folder: Path, tiny_tokenizer: Tokenizer, messages: list[str]
) -> None:
    """As a [PAD] that was added to the tokenizer alone; transformers generates too, unless a text has it."""
    rust = RustTokenizer.from_str(tiny_tokenizer.data.decode())
    rust.add_special_tokens(["[PAD]"])
    rust.save(str(folder / "tokenizer.json"))
    assert ours(folder) == theirs(folder)
    assert any("none for 1 added token ([PAD])" in line for line in messages)
    with pytest.raises(UsageError, match="token id 512 is outside the vocabulary of 512"):
        load_model(folder).generate("ka[PAD]")


# --- GGUF --------------------------------------------------------------------------------------------------------

CONFIG = GGUF_CONFIG.model_copy(update={"vocab_size": 512})


def gguf(path: Path, tokenizer: Tokenizer, **changes: Any) -> Path:
    """A GGUF file with a tokenizer, as llama.cpp's converter writes it."""
    model = json.loads(tokenizer.data)["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    stated = {
        "model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": [3, *[1] * (len(tokens) - 1)],
        "merges": merges,
    } | changes  # fmt: skip
    fields = {f"tokenizer.ggml.{name}": value for name, value in stated.items()}
    return write_gguf(path, CONFIG, hf_weights(CONFIG), **fields)


@pytest.mark.parametrize("add_bos", [None, False, True])
def test_a_gguf_file_alone_gives_the_ids_of_transformers(
    tmp_path: Path, tiny_tokenizer: Tokenizer, add_bos: bool | None
) -> None:
    path = gguf(tmp_path / "x.gguf", tiny_tokenizer, add_bos_token=add_bos)
    found = ours(path)
    assert found == theirs(tmp_path, gguf_file=path.name)
    assert (found[0][0][0] == 0) == bool(add_bos)


def test_a_gguf_file_decides_about_the_tokenizer_beside_it(
    tmp_path: Path, tiny_tokenizer: Tokenizer, messages: list[str]
) -> None:
    beside, plain = tmp_path / "tokenizer.json", tiny_tokenizer.encode("ka")
    for data in (tiny_tokenizer.data, with_template(tiny_tokenizer)):
        beside.write_bytes(data)
        for add_bos, expected in ((True, [0, *plain]), (False, plain)):
            path = gguf(tmp_path / "x.gguf", tiny_tokenizer, add_bos_token=add_bos)
            assert load_model(path).tokenizer.encode_prompts(["ka"]) == [expected]
    path = gguf(tmp_path / "x.gguf", tiny_tokenizer)
    assert load_model(path).tokenizer.encode_prompts(["ka"]) == [[0, *plain]]  # as the one beside it says
    assert not messages
    tokens = json.loads(tiny_tokenizer.data)["model"]["vocab"]
    swapped = dict(
        zip(tokens, [tokens[token] for token in [*list(tokens)[:300], *reversed(list(tokens)[300:])]], strict=True)
    )
    document = json.loads(tiny_tokenizer.data)
    document["model"]["vocab"] = swapped
    beside.write_text(json.dumps(document))
    assert load_model(path).tokenizer.encode("ka") == plain
    assert any("has other tokens than x.gguf" in line for line in messages)


@pytest.mark.parametrize("index", [512, 2**64 - 1])
def test_a_beginning_that_is_no_token_is_not_added(tmp_path: Path, tiny_tokenizer: Tokenizer, index: int) -> None:
    path = gguf(tmp_path / "x.gguf", tiny_tokenizer, add_bos_token=True, eos_token_id=0)
    header = read_gguf_header(path)
    header.metadata["tokenizer.ggml.bos_token_id"] = index
    source = replace(resolve(path), weights=header)
    assert model_tokenizer.model_tokenizer(source).around() == ([], [])


def test_a_gguf_file_of_an_unknown_rule_asks_for_a_tokenizer_with_an_option_that_exists(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    path = gguf(tmp_path / "x.gguf", tiny_tokenizer, pre="tekken")
    with pytest.raises(DataError, match="its rule for words, 'tekken', is not implemented") as caught:
        _ = load_model(path).tokenizer
    assert "--tokenizer PATH" in caught.value.fix
    assert load_model(path, tokenizer=tiny_tokenizer.path).tokenizer.sha256 == tiny_tokenizer.sha256
