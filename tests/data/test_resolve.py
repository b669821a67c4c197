"""Text that is prepared on the fly, and whether it is still the same when a run is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from resmol.data.resolve import Text, check_same_inputs, open_or_prepare, prepare_text
from resmol.data.shards import TokenStream
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
    dataset = open_or_prepare(tmp_path / "data", Text((str(source),)), tiny_tokenizer)
    (source / "notes.pdf").write_bytes(b"%PDF-1.7")  # no text before, and none now
    (source / ".hidden.txt").write_text("x", encoding="utf-8")
    assert open_or_prepare(tmp_path / "data", Text((str(source),)), tiny_tokenizer).fingerprint == dataset.fingerprint
    edit(source)
    with pytest.raises(DataError, match=r"another text than .*in holds now: 2 files of 20 bytes then"):
        open_or_prepare(tmp_path / "data", Text((str(source),)), tiny_tokenizer)


def test_a_folder_that_moved_is_the_same(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("the text", encoding="utf-8")
    dataset = open_or_prepare(tmp_path / "data", Text((str(tmp_path / "in"),)), tiny_tokenizer)
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
    dataset = open_or_prepare(tmp_path / "data", Text(("~/a.txt",)), tiny_tokenizer)
    assert dataset.manifest.source.inputs[0].name == "a.txt"
    assert open_or_prepare(tmp_path / "data", Text(("~/a.txt",)), tiny_tokenizer).fingerprint == dataset.fingerprint


def test_a_prepared_folder_is_no_text(tiny_tokenizer: Tokenizer, tiny_dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is prepared already") as caught:
        prepare_text(tmp_path / "out", Text((str(tiny_dataset.root),)), tiny_tokenizer)
    assert caught.value.fix == f"use it as it is: --data {tiny_dataset.root}"


# --- the user's own held-out text --------------------------------------------------------------------------------


def documents(folder: Path, *names: str) -> Path:
    """Write one-document files that hold their own names; return the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text {name}", encoding="utf-8")
    return folder


def texts(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
    ids, found = stream.read(0, len(stream)).tolist(), [[]]
    for token in ids:
        if token == tokenizer.eos_id:
            found.append([])
        else:
            found[-1].append(token)
    return [tokenizer.decode(document) for document in found if document]


def test_text_that_is_named_as_held_out_is_never_trained_on(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    train = documents(tmp_path / "train", *(f"{letter}.txt" for letter in "abcdefgh"))
    val = documents(tmp_path / "val", "x.txt", "y.txt")
    text = Text((str(train),), (str(val),), val_fraction=0.9)
    dataset = prepare_text(tmp_path / "tokens", text, tiny_tokenizer)
    assert texts(dataset.val, tiny_tokenizer) == ["text x.txt", "text y.txt"]
    assert texts(dataset.train, tiny_tokenizer) == [f"text {letter}.txt" for letter in "abcdefgh"]
    assert (dataset.manifest.source.held_out, dataset.manifest.val.documents) == ("named", 2)


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "dev"])
def test_a_folder_may_divide_its_text_itself(tiny_tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    names = ("train/a.txt", "train/deep/val/b.txt", f"{name}/c.txt", "test/d.txt", "readme.txt")
    dataset = prepare_text(
        tmp_path / "tokens", Text((str(documents(tmp_path / "in", *names)),), val_fraction=0.9), tiny_tokenizer
    )
    assert texts(dataset.val, tiny_tokenizer) == [f"text {name}/c.txt"]
    assert texts(dataset.train, tiny_tokenizer) == ["text readme.txt", "text train/a.txt", "text train/deep/val/b.txt"]
    (unused,) = dataset.manifest.source.unused
    assert (unused.reason, unused.names) == ("the test split", ("in/test/d.txt",))


@pytest.mark.parametrize("names", [("train/a.txt", "b.txt"), ("val/a.txt", "b.txt"), ("train.txt", "val.txt")])
def test_a_folder_that_names_one_split_is_a_folder_like_any_other(
    tiny_tokenizer: Tokenizer, tmp_path: Path, names: tuple[str, ...]
) -> None:
    dataset = prepare_text(
        tmp_path / "tokens", Text((str(documents(tmp_path / "in", *names)),), val_fraction=0.0), tiny_tokenizer
    )
    assert (dataset.manifest.train.documents, dataset.manifest.source.held_out) == (2, "none")


def test_an_empty_split_is_refused(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = documents(tmp_path, "train.txt")
    (folder / "val.txt").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="no text in the held-out part"):
        prepare_text(
            tmp_path / "tokens", Text((str(folder / "train.txt"),), (str(folder / "val.txt"),)), tiny_tokenizer
        )


def test_the_held_out_text_is_compared_on_resume_too(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = documents(tmp_path, "train.txt", "val.txt")
    text = Text((str(folder / "train.txt"),), (str(folder / "val.txt"),))
    open_or_prepare(tmp_path / "data", text, tiny_tokenizer)
    open_or_prepare(tmp_path / "data", text, tiny_tokenizer)
    (folder / "val.txt").write_text("another", encoding="utf-8")
    with pytest.raises(DataError, match=r"another text than .*val\.txt"):
        open_or_prepare(tmp_path / "data", text, tiny_tokenizer)
    with pytest.raises(UsageError, match="prepared already, with its held-out text"):
        open_or_prepare(
            tmp_path / "data", Text((str(tmp_path / "data"),), (str(folder / "train.txt"),)), tiny_tokenizer
        )


def test_the_manifest_says_how_to_prepare_the_same_tokens_again(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Each option changes the tokens; forgetting one would give others."""
    rows = ["text one <|endoftext|>", "text two é", "text one <|endoftext|>"]
    lines = [f'{{"body": "{row}", "text": "no"}}\n' for row in rows]
    (tmp_path / "a.dat").write_text("".join(lines), encoding="latin-1")
    (tmp_path / "b.dat").write_text(lines[1].replace("two", "four"), encoding="latin-1")
    options = ReadOptions(text_field="body", encoding="latin-1", format="jsonl")
    inputs = (str(tmp_path / "a.dat"), str(tmp_path / "b.dat"))
    asked = Text(inputs[:1], inputs[1:], None, 0.5, options, "as-text", dedup=True, max_tokens=1000)
    first = prepare_text(tmp_path / "one", asked, tiny_tokenizer)
    again = Text.recorded(first.manifest.source, inputs)
    assert again == asked
    assert prepare_text(tmp_path / "two", again, tiny_tokenizer).manifest == first.manifest
