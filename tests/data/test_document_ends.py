"""End tokens that a text spells, and those that end documents: bits per byte counts the bytes of the former."""

from __future__ import annotations

import itertools
import random

import pytest
from tiny import synthetic_texts

from resmol.data.document_ends import count_spelled_ends
from resmol.data.loader import Loader
from resmol.data.prepare import prepare
from resmol.data.readers import from_texts
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def spelled(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, list[str]]:
    """Documents in several shards, with the spelling of the end token in them, at their ends and alone."""
    draw = random.Random(3)
    texts = [text + "<|endoftext|>" * draw.randrange(3) + text[:5] * draw.randrange(2) for text in synthetic_texts(40)]
    texts += ["<|endoftext|>", "a<|endoftext|>"]
    out = tmp_path_factory.mktemp("spelled") / "out"
    return prepare(out, from_texts(texts), tiny_tokenizer, val_fraction=0.0, shard_tokens=300), texts


def test_all_spellings_are_counted_and_no_ends(spelled: tuple[Dataset, list[str]]) -> None:
    dataset, texts = spelled
    assert len(dataset.train.shards) > 3
    number = sum(text.count("<|endoftext|>") for text in texts)
    assert count_spelled_ends(dataset.train, 0, 0, len(dataset.train)) == number > 10
    assert dataset.manifest.source.special_tokens == {"<|endoftext|>": number}


def test_ranges_add_up(spelled: tuple[Dataset, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = spelled[0].train
    whole = count_spelled_ends(stream, 0, 0, len(stream))
    monkeypatch.setattr("resmol.data.document_ends._BLOCK_TOKENS", 7)
    borders = [0, 1, 299, 300, 301, 777, len(stream)]
    assert sum(count_spelled_ends(stream, 0, *pair) for pair in itertools.pairwise(borders)) == whole


def test_the_bytes_of_an_evaluation_are_those_of_the_text(
    spelled: tuple[Dataset, list[str]], tiny_tokenizer: Tokenizer
) -> None:
    dataset, texts = spelled
    loader = Loader(dataset.train, seq_len=32, micro_batch_size=1, grad_accum_steps=1, seed=0, eos_id=0)

    def bytes_of(limit: int | None) -> int:
        targets = [
            token for batch in loader.sequential(2, limit) for token in batch.targets[batch.targets >= 0].tolist()
        ]
        spelled_bytes = tiny_tokenizer.spelled_end_bytes(loader.spelled_ends(limit))
        return int(tiny_tokenizer.byte_lengths()[targets].sum()) + spelled_bytes

    first = len(tiny_tokenizer.token_bytes(int(dataset.train.read(0, 1)[0])))  # the only token that is no target
    assert bytes_of(None) == sum(len(text.encode()) for text in texts) - first
    ids = tiny_tokenizer.encode(texts[0])
    assert len(ids) > 33
    assert bytes_of(1) == len(b"".join(map(tiny_tokenizer.token_bytes, ids[1:33])))
