from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmol.data.prepare import prepare
from resmol.data.readers import from_texts
from resmol.data.shards import open_dataset, token_dtype, token_width, verify_shards
from resmol.errors import DataError


@pytest.fixture
def copy(tiny_dataset, tmp_path) -> Path:
    """A copy of the tiny dataset that a test may damage."""
    return Path(shutil.copytree(tiny_dataset.root, tmp_path / "copy"))


def edit(root: Path, change) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    change(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))


def test_an_opened_folder_equals_the_prepared_one_wherever_it_lies(tiny_dataset, copy, messages):
    opened = open_dataset(copy)
    assert opened.fingerprint == tiny_dataset.fingerprint
    assert opened.manifest == tiny_dataset.manifest
    assert len(opened.train) == opened.manifest.train.tokens > 30_000
    assert len(opened.val) > 500
    assert (opened.vocab_size, opened.eos_id) == (512, 0)
    verify_shards(opened)
    assert len(messages) == 1


@given(st.data())
def test_any_range_is_read_across_shard_borders(tiny_dataset, data):
    stream = tiny_dataset.train
    whole = np.concatenate([np.fromfile(tiny_dataset.root / shard.name, dtype="<u2") for shard in stream.shards])
    assert len(stream.shards) > 2
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, min(len(stream), start + 30_000)))
    tokens = stream.read(start, stop)
    assert tokens.dtype == np.int64
    assert (tokens == whole[start:stop]).all()


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 10**9)])
def test_a_range_outside_is_an_error(tiny_dataset, start, stop):
    with pytest.raises(IndexError):
        tiny_dataset.train.read(start, stop)


def test_wide_vocabularies_take_four_bytes():
    # datatrove's rule: 65,536 ids still fit into two bytes.
    assert [token_width(size) for size in (2, 65_535, 65_536, 65_537)] == [2, 2, 2, 4]
    assert token_dtype(4) == np.dtype("<u4")


def test_a_token_outside_the_vocabulary_is_named(copy):
    shard = copy / "train" / "00001.ds"
    with shard.open("r+b") as file:
        file.seek(2 * 123)
        file.write((512).to_bytes(2, "little"))
    dataset = open_dataset(copy)
    before = dataset.manifest.train.shards[0].tokens
    assert len(dataset.train.read(0, before + 123)) == before + 123
    with pytest.raises(DataError, match=r"train/00001\.ds: token 123 is 512"):
        dataset.train.read(before - 5, before + 200)


# Damage


def flip(path: Path, place: int) -> None:
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", ["train/00000.ds", "train/00002.ds", "val/00000.ds", "train/00001.ds.index"])
@pytest.mark.parametrize("place", [0, 5001, -1])
def test_a_flipped_bit_is_found_and_named(copy, name, place):
    flip(copy / name, place)
    dataset = open_dataset(copy)
    with pytest.raises(DataError, match=name.split("/")[1]):
        verify_shards(dataset)


@pytest.mark.parametrize("name", ["train/00000.ds", "val/00000.ds", "train/00001.ds.index"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(b"1"),
        lambda path: path.unlink(),
        lambda path: (path.rename(path.with_name("elsewhere")), path.symlink_to("elsewhere")),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["shorter", "longer", "tiny", "gone", "link", "folder"],
)
def test_a_file_of_another_size_or_kind_is_refused_at_once(copy, name, damage):
    damage(copy / name)
    with pytest.raises(DataError, match=name.split("/")[1]):
        open_dataset(copy)


def test_a_shard_that_shrinks_after_opening_is_an_error(copy):
    dataset = open_dataset(copy)
    (copy / "train" / "00000.ds").write_bytes(b"")
    with pytest.raises(DataError, match=r"00000\.ds"):
        dataset.train.read(0, 10)


# The manifest comes from outside


def first_shard(manifest):
    return manifest["train"]["shards"][0]


@pytest.mark.parametrize(
    "name",
    [
        "../secret.ds",
        "/etc/passwd",
        "train/../../x.ds",
        "train\\00000.ds",
        "other/00000.ds",
        ".ds",
        "a.bin",
        "train/.ds",
        "train/a\n.ds",
        "",
    ],
)
def test_only_plain_names_inside_the_folder_are_accepted(copy, name):
    edit(copy, lambda manifest: first_shard(manifest).update(name=name))
    with pytest.raises(DataError, match="plain relative name"):
        open_dataset(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(format_version=2),
        lambda manifest: manifest.update(format="something"),
        lambda manifest: manifest.update(token_bytes=3),
        lambda manifest: manifest.update(token_bytes=4),
        lambda manifest: manifest.update(extra=1),
        lambda manifest: manifest.pop("val"),
        lambda manifest: manifest["train"].update(tokens=manifest["train"]["tokens"] + 1),
        lambda manifest: manifest["train"].update(documents=0),
        lambda manifest: first_shard(manifest).update(tokens=-1),
        lambda manifest: first_shard(manifest).update(tokens=str(first_shard(manifest)["tokens"])),
        lambda manifest: first_shard(manifest).update(start=1),
        lambda manifest: first_shard(manifest).update(bytes=10**30),
        lambda manifest: first_shard(manifest).update(sha256="x"),
        lambda manifest: manifest["tokenizer"].update(vocab_size=0),
    ],
)
def test_a_manifest_that_does_not_add_up_is_refused(copy, change):
    edit(copy, change)
    with pytest.raises(DataError, match="manifest"):
        open_dataset(copy)


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"[" * 100_000, b"\xff", b"{}"])
def test_rubbish_is_no_manifest(copy, data):
    (copy / "manifest.json").write_bytes(data)
    with pytest.raises(DataError, match="manifest"):
        open_dataset(copy)


def test_a_folder_without_manifest_is_not_prepared(tmp_path):
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path)
    assert "resmol prepare" in caught.value.fix


def test_the_fingerprint_depends_on_all_that_determines_the_tokens(copy):
    before = open_dataset(copy).fingerprint
    edit(copy, lambda manifest: manifest.update(created_with="another version"))
    assert open_dataset(copy).fingerprint == before
    edit(copy, lambda manifest: manifest["tokenizer"].update(sha256="0" * 64))
    without_tokenizer = open_dataset(copy).fingerprint
    edit(copy, lambda manifest: manifest["train"]["shards"].reverse())
    assert len({before, without_tokenizer, open_dataset(copy).fingerprint}) == 3


def test_an_empty_split_has_no_tokens(tiny_tokenizer, tmp_path):
    dataset = prepare(tmp_path / "out", from_texts(["text"]), tiny_tokenizer, val_fraction=0.0)
    assert len(dataset.val) == 0
    assert dataset.val.read(0, 0).size == 0
