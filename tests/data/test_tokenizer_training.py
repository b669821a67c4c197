"""A tokenizer made from text: the same each time, usable everywhere, whole or not there."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from tiny import synthetic_texts
from transformers import AutoTokenizer

from resmol.data import tokenizer_training as module
from resmol.data.readers import from_texts, read_inputs
from resmol.data.tokenizer import Tokenizer, load_tokenizer
from resmol.data.tokenizer_training import SMALLEST, train_tokenizer
from resmol.errors import DataError, UsageError
from resmol.system.progress import Advance

TEXTS = synthetic_texts(300)
COMMAND = """
import sys
from resmol.__main__ import main
main(["tokenizer", "train", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(tmp_path_factory.mktemp("made") / "tok", from_texts(TEXTS), 512)


def train_in_a_process(out: Path, text: Path, *, threads: int) -> bytes:
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "PYTHONHASHSEED": str(threads)}
    command = [sys.executable, "-c", COMMAND, str(out), "--input", str(text), "--vocab-size", "400"]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    return (out / "tokenizer.json").read_bytes()


def test_it_is_made_as_smollm2_s_is(made: Tokenizer, genuine_tokenizer: Tokenizer) -> None:
    """The same rule for words; all bytes, the end first."""
    ours, theirs = json.loads(made.data), json.loads(genuine_tokenizer.data)
    assert ours["pre_tokenizer"] == theirs["pre_tokenizer"]
    assert ours["normalizer"] is theirs["normalizer"] is None
    assert ours["post_processor"] is theirs["post_processor"] is None
    assert (made.vocab_size, made.eos_id, made.special_tokens) == (512, 0, {0: "<|endoftext|>"})
    assert made.untokenizable_bytes == b""


def test_the_merges_are_those_of_the_most_frequent_pairs(made: Tokenizer) -> None:
    """Counted here without the library, for the first merge; words begin at spaces, digits stand alone."""
    words = [f" {word}" for text in TEXTS for word in text.split(" ")]
    pairs: dict[tuple[str, str], int] = {}
    for word in words:
        for pair in itertools.pairwise(word):
            if pair[0].isascii() and pair[1].isascii() and pair[0].isalpha() and pair[1].isalpha():
                pairs[pair] = pairs.get(pair, 0) + 1
    first = tuple(json.loads(made.data)["model"]["merges"][0])
    assert pairs[first] == max(pairs.values())


def test_the_same_text_gives_the_same_file(tmp_path: Path) -> None:
    """With other threads and other hashes of strings too."""
    text = tmp_path / "input.txt"
    text.write_text("\n".join(TEXTS), encoding="utf-8")
    first = train_in_a_process(tmp_path / "a", text, threads=1)
    assert first == train_in_a_process(tmp_path / "b", text, threads=2)


def test_transformers_loads_it_and_agrees(made: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(made.path.parent)
    text = "kalomi  12 é<|endoftext|>\n\t😀"
    assert theirs(text)["input_ids"] == made.encode(text)
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (0, 0, 512)


@examples(100)
@given(st.text(max_size=60))
def test_any_text_comes_back_whole(made: Tokenizer, text: str) -> None:
    assert made.decode(made.encode(text)) == text


def test_every_byte_is_a_token(made: Tokenizer) -> None:
    assert {made.token_bytes(token) for token in range(1, SMALLEST)} == {bytes([value]) for value in range(256)}


def test_its_folder_is_what_tokenizer_takes(made: Tokenizer, own_cache: Path) -> None:
    assert load_tokenizer(str(made.path.parent)).data == made.data
    manifest = json.loads((made.path.parent / "manifest.json").read_text())
    assert (manifest["sha256"], manifest["vocab_size"], manifest["documents"]) == (made.sha256, 512, 300)
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in TEXTS)


def test_text_in_pieces_gives_what_the_whole_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(TEXTS)
    whole = train_tokenizer(tmp_path / "whole", from_texts([text]), 400)
    monkeypatch.setattr("resmol.data.chunking.PIECE_CHARACTERS", 500)
    assert train_tokenizer(tmp_path / "pieces", from_texts([text]), 400).data == whole.data


def test_json_lines_are_read_and_what_is_held_out_is_not_seen(tmp_path: Path) -> None:
    for split, texts in (("train", TEXTS[:200]), ("val", ["qqqq " * 1000])):
        (tmp_path / "in" / split).mkdir(parents=True)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "in" / split / "a.jsonl").write_text(lines, encoding="utf-8")
    made = train_tokenizer(tmp_path / "tok", read_inputs([tmp_path / "in"]), 400)
    assert made.data == train_tokenizer(tmp_path / "same", from_texts(TEXTS[:200]), 400).data
    assert not any(b"qq" in made.token_bytes(token) for token in range(400))


@pytest.mark.parametrize(
    ("texts", "size", "error", "sentence"),
    [
        (["ab ab ab xyz"], 1000, DataError, r"yields 259 entries, and 1,000 are asked for"),
        ([""], 300, DataError, "there is no text in texts"),
        (TEXTS, 256, UsageError, "--vocab-size is 256"),
        (TEXTS, 1 << 25, UsageError, "--vocab-size is 33,554,432"),
    ],
)
def test_what_cannot_be_made_is_said_and_leaves_nothing(
    tmp_path: Path, texts: list[str], size: int, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        train_tokenizer(tmp_path / "tok", from_texts(texts), size)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(made: Tokenizer) -> None:
    with pytest.raises(UsageError, match="exists already"):
        train_tokenizer(made.path.parent, from_texts(TEXTS), 300)


def test_an_unreadable_text_is_the_readers_error(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        train_tokenizer(tmp_path / "tok", read_inputs([tmp_path / "bad.jsonl"]), 300)


def test_a_crash_while_it_is_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_manifest", fail)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(tmp_path / "tok", from_texts(TEXTS), 300)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("phase", ["", "finding merges"])
def test_ctrl_c_ends_it_while_text_is_read_and_while_merges_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    @contextmanager
    def interrupted(_title: str) -> Iterator[Advance]:
        def advance(_done: int, _total: int | None, note: str) -> None:
            if note == phase:
                raise KeyboardInterrupt

        yield advance

    monkeypatch.setattr(module, "byte_progress", interrupted)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(tmp_path / "tok", from_texts(TEXTS), 400)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == before, "the work is left behind"
