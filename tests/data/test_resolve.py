"""Text that is prepared on the fly, and whether it is still the same when a run is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from resmol.data.resolve import Text, check_same_inputs, open_or_prepare, prepare_text
from resmol.data.text_file import ReadOptions
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError, UsageError


def grow(folder: Path) -> None:
    (folder / "b.txt").write_text("more text", encoding="utf-8")


def change(folder: Path) -> None:
    (folder / "a.txt").write_text("the Text", encoding="utf-8")


def shrink(folder: Path) -> None:
    (folder / "z.txt").unlink()


def rename(folder: Path) -> None:
    (folder / "a.txt").rename(folder / "zz.txt")  # the order of the documents


@pytest.mark.parametrize("edit", [grow, change, shrink, rename])
def test_a_folder_whose_files_changed_is_refused(edit, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a", "z"):
        (source / f"{name}.txt").write_text(f"the text {name}", encoding="utf-8")
    dataset = open_or_prepare(tmp_path / "data", str(source), tiny_tokenizer)
    (source / "notes.pdf").write_bytes(b"%PDF-1.7")  # no text before, and none now
    (source / ".hidden.txt").write_text("x", encoding="utf-8")
    assert open_or_prepare(tmp_path / "data", str(source), tiny_tokenizer).fingerprint == dataset.fingerprint
    edit(source)
    with pytest.raises(DataError, match=r"another text than .*in holds now: 2 files of 20 bytes then"):
        open_or_prepare(tmp_path / "data", str(source), tiny_tokenizer)


def test_a_folder_that_moved_is_the_same(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("the text", encoding="utf-8")
    dataset = open_or_prepare(tmp_path / "data", str(tmp_path / "in"), tiny_tokenizer)
    check_same_inputs(dataset, (tmp_path / "in").rename(tmp_path / "moved"))
    with pytest.raises(DataError, match="does not exist"):
        check_same_inputs(dataset, tmp_path / "in")


def test_control_tokens_in_the_text_are_counted_or_text(tiny_tokenizer: Tokenizer, tmp_path: Path, messages) -> None:
    path = tmp_path / "a.txt"
    path.write_text("It prints <|endoftext|> at the end.\n" * 3, encoding="utf-8")
    tokens = prepare_text(tmp_path / "tokens", Text((str(path),), val_fraction=0.0), tiny_tokenizer)
    assert tokens.manifest.source.special_tokens == {"<|endoftext|>": 3}
    assert tokens.train.read(0, len(tokens.train)).tolist().count(0) == 4
    assert any("3 spellings of control tokens" in line and "<|endoftext|> 3" in line for line in messages)
    messages.clear()
    options = Text((str(path),), val_fraction=0.0, special_tokens="as-text")
    text = prepare_text(tmp_path / "text", options, tiny_tokenizer)
    ids = text.train.read(0, len(text.train)).tolist()
    assert ids.count(0) == 1
    assert tiny_tokenizer.decode(ids[:-1]) == path.read_text(encoding="utf-8")
    assert text.manifest.source.special_tokens == {}
    assert not any("spellings of control" in line for line in messages)


def test_options_that_make_no_sense(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="--special-tokens is 'none'"):
        Text(("a.txt",), special_tokens="none")
    with pytest.raises(UsageError, match="named corpus"):
        Text(corpus="stdlib", options=ReadOptions(text_field="body")).open()


def test_a_path_may_begin_with_a_tilde(tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("the text", encoding="utf-8")
    dataset = open_or_prepare(tmp_path / "data", "~/a.txt", tiny_tokenizer)
    assert dataset.manifest.source.inputs[0].name == "a.txt"
    assert open_or_prepare(tmp_path / "data", "~/a.txt", tiny_tokenizer).fingerprint == dataset.fingerprint


def test_a_prepared_folder_is_no_text(tiny_tokenizer: Tokenizer, tiny_dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is prepared already") as caught:
        prepare_text(tmp_path / "out", Text((str(tiny_dataset.root),)), tiny_tokenizer)
    assert caught.value.fix == f"use it as it is: --data {tiny_dataset.root}"
