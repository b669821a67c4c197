from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import synthetic_texts

from resmol.data.datatrove import import_datatrove, is_token_folder
from resmol.data.shards import verify_shards
from resmol.errors import DataError, UsageError


@pytest.fixture
def documents(tiny_tokenizer) -> list[list[int]]:
    return [[*tiny_tokenizer.encode(text), tiny_tokenizer.eos_id] for text in synthetic_texts(60)]


def write_ds(
    path: Path, documents: list[list[int]], *, width: int = 2, index: bool = True, metadata: bool = True
) -> None:
    """Write what datatrove's TokenizedFile writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = [token for document in documents for token in document]
    path.write_bytes(np.array(tokens, dtype=f"<u{width}").tobytes())
    if index:
        ends = np.cumsum([len(document) for document in documents]).astype("<u8")
        Path(f"{path}.index").write_bytes(ends.tobytes())
    if metadata:
        Path(f"{path}.metadata").write_text(f"someone/tokenizer|{width}\n{len(tokens)}\n{len(tokens)} T")


def everything(dataset) -> list[int]:
    return [token for stream in (dataset.train, dataset.val) for token in stream.read(0, len(stream)).tolist()]


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("index", [True, False])
def test_a_datatrove_folder_is_taken_over_in_place(tiny_tokenizer, tmp_path, documents, width, index):
    write_ds(tmp_path / "00000_00000_shuffled.ds", documents[:40], width=width, index=index)
    write_ds(tmp_path / "00000_00001_shuffled.ds", documents[40:], width=width, index=index)
    assert is_token_folder(tmp_path)
    dataset = import_datatrove(tmp_path, tiny_tokenizer, val_fraction=0.1)
    assert not is_token_folder(tmp_path)
    verify_shards(dataset)
    assert everything(dataset) == [token for document in documents for token in document]
    # Whole documents from the end, at least the fraction and less than one document more.
    total, last = sum(map(len, documents)), max(map(len, documents))
    assert 0.1 * total - 1 <= len(dataset.val) < 0.1 * total + last
    assert dataset.val.read(0, 5).tolist() == documents[60 - dataset.manifest.val.documents][:5]
    assert dataset.manifest.train.documents + dataset.manifest.val.documents == 60
    assert dataset.manifest.source.held_out == "documents"
    assert dataset.manifest.token_bytes == width


def test_train_and_val_folders_are_the_splits(tiny_tokenizer, tmp_path, documents):
    write_ds(tmp_path / "train" / "00000.ds", documents[:50], metadata=False)
    write_ds(tmp_path / "val" / "00000.ds", documents[50:], metadata=False)
    dataset = import_datatrove(tmp_path, tiny_tokenizer)
    assert (dataset.manifest.train.documents, dataset.manifest.val.documents) == (50, 10)
    assert everything(dataset) == [token for document in documents for token in document]


def test_a_single_document_is_divided_by_position(tiny_tokenizer, tmp_path, documents):
    write_ds(tmp_path / "00000.ds", documents[:1])
    dataset = import_datatrove(tmp_path, tiny_tokenizer, val_fraction=0.25)
    assert everything(dataset) == documents[0]
    assert len(dataset.val) == round(0.25 * len(documents[0]))
    assert dataset.manifest.source.held_out == "position"


def test_documents_without_their_end_token_are_said(tiny_tokenizer, tmp_path, documents, messages):
    write_ds(tmp_path / "00000.ds", [document[:-1] for document in documents[:10]] + documents[10:])
    import_datatrove(tmp_path, tiny_tokenizer)
    assert any(line.startswith("data: 10 documents without token 0 at the end") for line in messages)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a file of 2-byte tokens"),
        (lambda path: path.write_bytes(b""), "not a file of 2-byte tokens"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "does not match"),
        (lambda path: path.write_bytes(b"\xff\xff" + path.read_bytes()[2:]), "holds token 65535"),
        (lambda path: Path(f"{path}.index").write_bytes(b"123"), "8-byte numbers"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_nothing_is_written(tiny_tokenizer, tmp_path, documents, damage, message):
    write_ds(tmp_path / "00000.ds", documents)
    damage(tmp_path / "00000.ds")
    with pytest.raises(DataError, match=message):
        import_datatrove(tmp_path, tiny_tokenizer)
    assert not (tmp_path / "manifest.json").exists()


def test_only_folders_of_tokens_without_manifest(tiny_tokenizer, tiny_dataset, tmp_path):
    assert not is_token_folder(tmp_path)
    assert not is_token_folder(tiny_dataset.root)
    with pytest.raises(DataError, match=r"no \.ds files"):
        import_datatrove(tmp_path, tiny_tokenizer)
    with pytest.raises(UsageError, match="already"):
        import_datatrove(tiny_dataset.root, tiny_tokenizer)
    with pytest.raises(UsageError, match="val-fraction"):
        import_datatrove(tmp_path, tiny_tokenizer, val_fraction=1.5)
