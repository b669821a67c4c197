from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from tiny import synthetic_texts

from resmol.data import prepare as module
from resmol.data.prepare import Progress, prepare
from resmol.data.readers import Corpus, Document, from_texts, read_inputs
from resmol.data.shard_writer import SplitWriter
from resmol.data.summary import log_summary, statistics_rows
from resmol.data.text_file import ReadOptions
from resmol.data.text_stream import is_held_out
from resmol.errors import DataError, DiskFull, UsageError
from resmol.system.atomic_io import TEMPORARY_PREFIX


def tokens_of(stream) -> list[int]:
    return stream.read(0, len(stream)).tolist()


def expected(texts, tokenizer) -> list[int]:
    return [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_id]]


def test_every_token_of_every_document_is_kept_once_and_documents_stay_whole(tiny_tokenizer, tmp_path):
    texts = synthetic_texts(200)
    dataset = prepare(tmp_path / "out", from_texts(texts), tiny_tokenizer, val_fraction=0.1, shard_tokens=3000)
    held_out = {number for number in range(200) if is_held_out(number, 0, 0.1)}
    assert 5 < len(held_out) < 40
    train = [text for number, text in enumerate(texts) if number not in held_out]
    val = [texts[number] for number in sorted(held_out)]
    assert tokens_of(dataset.train) == expected(train, tiny_tokenizer)
    assert tokens_of(dataset.val) == expected(val, tiny_tokenizer)
    assert len(dataset.manifest.train.shards) > 3
    assert (dataset.manifest.train.documents, dataset.manifest.val.documents) == (len(train), len(val))
    assert dataset.manifest.source.text_bytes == len("".join(texts).encode())
    assert dataset.manifest.source.held_out == "documents"


def test_the_same_text_gives_the_same_fingerprint_anywhere(tiny_tokenizer, tmp_path):
    texts = synthetic_texts(30)
    one = prepare(tmp_path / "one", from_texts(texts), tiny_tokenizer)
    other = prepare(tmp_path / "far" / "away", from_texts(texts), tiny_tokenizer)
    assert one.fingerprint == other.fingerprint
    assert one.manifest == other.manifest
    assert prepare(tmp_path / "b", from_texts(texts[::-1]), tiny_tokenizer).fingerprint != one.fingerprint
    seeded = prepare(tmp_path / "c", from_texts(texts), tiny_tokenizer, val_fraction=0.2, seed=1)
    assert seeded.fingerprint != one.fingerprint


def test_batches_make_no_difference(tiny_tokenizer, tmp_path, monkeypatch):
    texts = synthetic_texts(30)
    one = prepare(tmp_path / "one", from_texts(texts), tiny_tokenizer)
    monkeypatch.setattr("resmol.data.text_stream.BATCH_BYTES", 50)
    monkeypatch.setattr("resmol.data.chunking.PIECE_CHARACTERS", 40)
    other = prepare(tmp_path / "other", from_texts(texts), tiny_tokenizer)
    assert one.fingerprint == other.fingerprint


# What is held out


def test_one_document_is_divided_by_position(tiny_tokenizer, tmp_path):
    text = " ".join(synthetic_texts(50))
    dataset = prepare(tmp_path / "out", from_texts([text]), tiny_tokenizer, val_fraction=0.1)
    whole = expected([text], tiny_tokenizer)
    assert tokens_of(dataset.train) + tokens_of(dataset.val) == whole
    assert len(dataset.val) == round(0.1 * len(whole))
    assert dataset.manifest.source.held_out == "position"


def test_without_luck_the_last_document_is_held_out(tiny_tokenizer, tmp_path):
    texts = synthetic_texts(4)
    dataset = prepare(tmp_path / "out", from_texts(texts), tiny_tokenizer, val_fraction=1e-9)
    assert tokens_of(dataset.train) == expected(texts[:3], tiny_tokenizer)
    assert tokens_of(dataset.val) == expected(texts[3:], tiny_tokenizer)
    assert dataset.manifest.train.documents == 3
    (shard,) = dataset.manifest.train.shards
    assert shard.bytes == 2 * shard.tokens


def test_a_last_document_of_more_than_half_is_divided(tiny_tokenizer, tmp_path):
    texts = ["short", " ".join(synthetic_texts(20))]
    dataset = prepare(tmp_path / "out", from_texts(texts), tiny_tokenizer, val_fraction=1e-9)
    assert tokens_of(dataset.train) + tokens_of(dataset.val) == expected(texts, tiny_tokenizer)
    assert len(dataset.val) == 1


def test_nothing_is_held_out_when_nothing_is_wanted(tiny_tokenizer, tmp_path):
    texts = synthetic_texts(3)
    dataset = prepare(tmp_path / "out", from_texts(texts), tiny_tokenizer, val_fraction=0.0)
    assert tokens_of(dataset.train) == expected(texts, tiny_tokenizer)
    assert len(dataset.val) == 0


def test_a_corpus_can_choose_its_split(tiny_tokenizer, tmp_path):
    texts = synthetic_texts(3)

    def read(counts):
        for number, text in enumerate(texts):
            yield Document(str(number), iter([text]), "val" if number == 0 else "train")

    dataset = prepare(tmp_path / "out", Corpus("chosen", None, read), tiny_tokenizer, val_fraction=0.9)
    assert tokens_of(dataset.val) == expected(texts[:1], tiny_tokenizer)
    assert tokens_of(dataset.train) == expected(texts[1:], tiny_tokenizer)


@examples(60)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=8),
    val_fraction=st.floats(0, 0.99),
    shard_tokens=st.integers(1, 10),
)
def test_tokens_add_up_whatever_the_texts(tiny_tokenizer, tmp_path_factory, texts, val_fraction, shard_tokens):
    out = tmp_path_factory.mktemp("any") / "out"
    options = {"val_fraction": val_fraction, "shard_tokens": shard_tokens}
    if not any(texts):
        with pytest.raises(DataError, match="no text"):
            prepare(out, from_texts(texts), tiny_tokenizer, **options)
        return
    dataset = prepare(out, from_texts(texts), tiny_tokenizer, **options)
    full = [text for text in texts if text]
    assert sorted(tokens_of(dataset.train) + tokens_of(dataset.val)) == sorted(expected(full, tiny_tokenizer))
    assert len(dataset.train) > 0
    assert (len(dataset.val) > 0) == (val_fraction > 0)
    assert dataset.manifest.source.empty_documents == len(texts) - len(full)


# Counts and messages


def test_what_is_lost_is_counted_and_said(genuine_tokenizer, tmp_path, messages):
    path = tmp_path / "odd.txt"
    path.write_bytes(b"good \xff bad \x04 text")
    dataset = prepare(tmp_path / "out", read_inputs([path], ReadOptions(encoding="utf-8")), genuine_tokenizer)
    log_summary(dataset)
    source = dataset.manifest.source
    assert (source.replacements, source.untokenizable_bytes, source.forced_cuts) == (1, 1, 0)
    assert source.inputs[0].name == "odd.txt"
    assert any("replaced by U+FFFD" in line for line in messages)
    assert any("dropped" in line for line in messages)
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_copies_are_counted_and_those_in_both_splits_are_a_warning(tiny_tokenizer, tmp_path, messages):
    texts = synthetic_texts(40)
    held_out = next(number for number in range(1, 40) if is_held_out(number, 0, 0.1))
    copied = [*texts, texts[held_out], texts[0]]
    dataset = prepare(tmp_path / "out", from_texts(copied), tiny_tokenizer, val_fraction=0.1)
    assert not any(is_held_out(number, 0, 0.1) for number in (40, 41))
    source = dataset.manifest.source
    assert (source.duplicates, source.val_in_train) == (2, 1)
    log_summary(dataset)
    assert any("2 exact copies of other documents" in line for line in messages)
    assert any("1 held-out document also in the training text" in line for line in messages)
    clean = prepare(tmp_path / "clean", from_texts(texts), tiny_tokenizer, val_fraction=0.1).manifest.source
    assert (clean.duplicates, clean.val_in_train) == (0, 0)


def test_a_copy_that_is_held_out_because_nothing_else_was(tiny_tokenizer, tmp_path):
    texts = [*synthetic_texts(3), synthetic_texts(1)[0]]
    dataset = prepare(tmp_path / "out", from_texts(texts), tiny_tokenizer, val_fraction=1e-9)
    assert dataset.manifest.val.documents == 1
    assert (dataset.manifest.source.duplicates, dataset.manifest.source.val_in_train) == (1, 1)
    long = prepare(tmp_path / "divided", from_texts(["word " * 99]), tiny_tokenizer, val_fraction=0.1)
    assert (long.manifest.source.duplicates, long.manifest.source.val_in_train) == (0, 0)


def test_copies_are_found_in_documents_of_many_pieces(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("resmol.data.chunking.PIECE_CHARACTERS", 40)
    texts = [" ".join(synthetic_texts(5)), "x", " ".join(synthetic_texts(5)), "x y"]
    assert prepare(tmp_path / "out", from_texts(texts), tiny_tokenizer).manifest.source.duplicates == 1


def test_left_out_copies_leave_what_the_distinct_texts_give(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("resmol.data.chunking.PIECE_CHARACTERS", 40)
    monkeypatch.setattr("resmol.data.duplicates.RECENT", 4)
    long = [" ".join(synthetic_texts(5, seed=seed)) for seed in (1, 2)]
    texts = [*synthetic_texts(30), *long]
    copied = [*texts[:9], texts[3], texts[0], *texts[9:], long[1], long[0], texts[3]]
    whole = prepare(tmp_path / "whole", from_texts(texts), tiny_tokenizer, val_fraction=0.1, shard_tokens=50)
    options = {"val_fraction": 0.1, "shard_tokens": 50, "dedup": True}
    one = prepare(tmp_path / "one", from_texts(copied), tiny_tokenizer, **options)
    assert one.fingerprint == whole.fingerprint
    source, known = one.manifest.source, whole.manifest.source
    assert (source.duplicates, source.val_in_train, source.documents) == (5, 0, len(texts))
    assert source.statistics.document_tokens == known.statistics.document_tokens
    most = source.statistics.most_frequent[0]
    assert most.times == 3
    assert texts[3].startswith(most.beginning)


def test_statistics_count_letters_lengths_and_characters(tiny_tokenizer, tmp_path):
    texts = ["Hello", "Привет мир", "漢字かな 한글 λ", "a" * 40, "7 + 7 = 14 😀"]
    dataset = prepare(tmp_path / "out", from_texts(texts), tiny_tokenizer, val_fraction=0.0)
    found = dataset.manifest.source.statistics
    assert found.letters == {
        "Latin": 45, "Cyrillic": 9, "Han": 2, "Hiragana": 2, "Hangul": 2, "Greek": 1,
    }  # fmt: skip
    assert found.characters == sum(map(len, texts))
    lengths = sorted(len(expected([text], tiny_tokenizer)) for text in texts)
    shares = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
    assert found.document_tokens == tuple(np.quantile(lengths, shares, method="lower"))
    rows = dict(statistics_rows(dataset.manifest))
    assert rows["letters"].startswith("Latin 73.77%, Cyrillic 14.75%")


def test_what_was_found_and_not_used_is_in_the_manifest_and_said(tiny_tokenizer, tmp_path, messages):
    folder = tmp_path / "in"
    (folder / ".git").mkdir(parents=True)
    for name in ("a.txt", "b.py", "c.py", ".git/d.txt"):
        (folder / name).write_text("text")
    (folder / "e.txt").write_bytes(b"ORC" + bytes(99))
    dataset = prepare(tmp_path / "out", read_inputs([folder]), tiny_tokenizer)
    log_summary(dataset)
    assert json.loads((tmp_path / "out" / "manifest.json").read_bytes())["source"]["unused"] == [
        {"reason": "hidden", "files": 1, "names": ["in/.git/"]},
        {"reason": "name ends in .py", "files": 2, "names": ["in/b.py", "in/c.py"]},
        {"reason": "an ORC file", "files": 1, "names": ["in/e.txt"]},
    ]
    assert "data: not used: 2 (name ends in .py): in/b.py, in/c.py" in messages


def test_a_folder_in_which_nothing_turns_out_to_be_text(tiny_tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"ORC" + bytes(99))
    with pytest.raises(DataError, match=r"no text in .*in; not used: 1 \(an ORC file\): in/a.txt"):
        prepare(tmp_path / "out", read_inputs([tmp_path / "in"]), tiny_tokenizer)


def test_progress_begins_at_once_and_ends_with_the_totals(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("resmol.data.text_stream.BATCH_BYTES", 20_000)
    path = tmp_path / "in.txt"
    path.write_text("hello world " * 20_000)
    seen: list[Progress] = []
    dataset = prepare(tmp_path / "out", read_inputs([path]), tiny_tokenizer, on_progress=seen.append)
    size = path.stat().st_size
    assert seen[0] == Progress(0, size, 0, 0)
    assert len(seen) > 3
    assert seen[-1] == Progress(size, size, 1, len(dataset.train) + len(dataset.val))


# Nothing half


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_that_is_in_use_is_left_alone(tiny_tokenizer, tmp_path):
    out = tmp_path / "out"
    prepare(out, from_texts(["one"]), tiny_tokenizer)
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="prepared data folder already"):
        prepare(out, from_texts(["two"]), tiny_tokenizer)
    assert (out / "manifest.json").read_bytes() == before
    other = tmp_path / "other"
    other.mkdir()
    prepare(other, from_texts(["fine, it is empty"]), tiny_tokenizer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(UsageError, match="not an empty folder"):
        prepare(tmp_path / "full", from_texts(["x"]), tiny_tokenizer)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_that_is_none(tiny_tokenizer, tmp_path, fraction):
    with pytest.raises(UsageError, match="--val-fraction"):
        prepare(tmp_path / "out", from_texts(["x"]), tiny_tokenizer, val_fraction=fraction)


def test_an_error_in_the_middle_leaves_nothing_behind(tiny_tokenizer, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("fine " * 100_000)
    (folder / "b.jsonl").write_text("{broken")
    with pytest.raises(DataError, match="line 1"):
        prepare(tmp_path / "out", read_inputs([folder]), tiny_tokenizer)
    assert names(tmp_path) == {"in"}


def test_a_full_disk_is_said_and_leaves_nothing_behind(tiny_tokenizer, tmp_path, monkeypatch):
    class Full(SplitWriter):
        def append(self, ids):
            super().append(ids)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "SplitWriter", Full)
    with pytest.raises(DiskFull):
        prepare(tmp_path / "out", from_texts(["x"]), tiny_tokenizer)
    assert names(tmp_path) == set()


def test_an_interrupt_leaves_nothing_behind(tiny_tokenizer, tmp_path):
    def read(counts):
        yield Document("one", iter(["text"]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", Corpus("interrupted", None, read), tiny_tokenizer)
    assert not [name for name in names(tmp_path) if name == "out" or name.startswith(TEMPORARY_PREFIX)]


# The layout, byte by byte


def test_the_files_are_datatrove_s(tiny_tokenizer, tmp_path):
    texts = ["one two", "three"]
    dataset = prepare(tmp_path / "out", from_texts(texts), tiny_tokenizer, val_fraction=0.0)
    shard = tmp_path / "out" / "train" / "00000.ds"
    ids = expected(texts, tiny_tokenizer)
    assert shard.read_bytes() == np.array(ids, dtype="<u2").tobytes()
    ends = [len(expected(texts[:1], tiny_tokenizer)), len(ids)]
    assert (tmp_path / "out" / "train" / "00000.ds.index").read_bytes() == np.array(ends, dtype="<u8").tobytes()
    metadata = (tmp_path / "out" / "train" / "00000.ds.metadata").read_text()
    assert metadata.split("\n") == [f"sha256:{tiny_tokenizer.sha256}|2", str(len(ids)), f"{len(ids)} T"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["tokenizer"] == {"sha256": tiny_tokenizer.sha256, "vocab_size": 512, "eos_id": 0}
    assert manifest["token_bytes"] == 2
    assert dataset.manifest.to_json() == (tmp_path / "out" / "manifest.json").read_bytes()


def test_preparing_needs_no_torch():
    code = "import sys, resmol.data.datatrove, resmol.data.builtin_corpora; sys.exit('torch' in sys.modules)"
    source = str(Path(module.__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": source}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
