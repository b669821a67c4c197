"""Prompts are the first words of paragraphs, in the order of the text, from the held-out part."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import TrainTiny

from resmol.data.beginnings import first_words
from resmol.data.prepare import prepare
from resmol.data.readers import from_texts
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.run.directory import RunDir
from resmol.run.ledger import read_ledger, select


def words_of(tmp_path: Path, tokenizer: Tokenizer, *texts: str, most: int = 4) -> list[str]:
    return first_words(prepare(tmp_path / "data", from_texts(texts), tokenizer, val_fraction=0.0), tokenizer, most)


def test_they_begin_held_out_documents(tiny_dataset: Dataset, tiny_tokenizer: Tokenizer) -> None:
    tokens = tiny_dataset.val.read(0, len(tiny_dataset.val)).tolist()
    documents = tiny_tokenizer.decode(tokens).split("<|endoftext|>")
    found = first_words(tiny_dataset, tiny_tokenizer, 5)
    assert len(found) == 5
    assert all(any(text.startswith(words) for text in documents) for words in found)
    assert [len(words.split()) for words in found] == [4] * 5
    assert found == first_words(tiny_dataset, tiny_tokenizer, 5)


def test_a_play_gives_its_speakers(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    play = "".join(f"\n{name}:\nlo mi ner ta, shu ver\nka lo mi\n" for name in ("ANNA", "BERT", "CARL") * 20)
    found = words_of(tmp_path, tiny_tokenizer, play)
    assert set(found) <= {"ANNA:\n", "BERT:\n", "CARL:\n"}
    assert found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ka lo\nmi ner ta shu ver\n" * 30, ["mi ner ta shu", "ka lo\n"]),
        ("ka lo mi ner ta shu. " * 30, ["ka lo mi ner"]),
        ("\u6f22\u5b57" * 10 + "\n" + "\u6f22\u5b57" * 40 + "\n", [("\u6f22\u5b57" * 6)]),
        ("kakakakakakakakakakaka lololololololololololololo mi\n" * 9, ["kakakakakakakakakakaka"]),
        ("lomi (ner ta\n" * 30, ["lomi (ner ta\n"]),
        ("lo mi ner ( ta\n" * 30, ["lo mi ner"]),
        ("\x07\x07 a\n" * 30, []),
        ("kalo" * 100, []),
    ],
)
def test_the_words_of_a_line(text: str, expected: list[str], tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    assert set(words_of(tmp_path, tiny_tokenizer, text)) <= set(expected)
    assert bool(words_of(tmp_path / "again", tiny_tokenizer, text)) is bool(expected)


def test_the_samples_of_a_run_continue_words_of_its_text(
    tmp_path: Path, train_tiny: TrainTiny, tiny_dataset: Dataset, tiny_tokenizer: Tokenizer
) -> None:
    run = RunDir(tmp_path / "run")
    for steps in (6, 11):
        train_tiny(run.path, steps, "sampling.prompt=", "sampling.every=5")
    (words,) = first_words(tiny_dataset, tiny_tokenizer, 1)
    assert {record["prompt"] for record in select(read_ledger(run.ledger).records, "sample")} == {words}
    assert run.load_config().sampling.prompt == words
    train_tiny(tmp_path / "own", 5, "sampling.prompt=lo", "sampling.every=5")
    assert {r["prompt"] for r in select(read_ledger(RunDir(tmp_path / "own").ledger).records, "sample")} == {"lo"}
