"""Held-out loss: a checkpoint is measured as its run is, whatever names it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import reference
from tiny import TrainTiny
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import processors

from resmol.__main__ import run as resmol
from resmol.data.resolve import Text, prepare_text
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError, UsageError
from resmol.interop.evaluate import evaluate_model
from resmol.interop.export import hf
from resmol.interop.export.exported_tokenizer import exported_tokenizer
from resmol.interop.load import load_model


@pytest.fixture
def run(train_tiny: TrainTiny, tmp_path: Path) -> Path:
    """A run whose settings are not the defaults of an evaluation: 16 tokens, attention across documents."""
    train_tiny(tmp_path / "run", 5, "data.document_mask=false", "sampling.every=0", "evaluation.every=0")
    return tmp_path / "run"


def test_a_checkpoint_is_measured_with_the_settings_and_the_text_of_its_run(run: Path, tiny_dataset: Dataset) -> None:
    checkpoint, data = run / "checkpoints" / "step-00000005", str(tiny_dataset.root)
    whole = evaluate_model(run)
    assert evaluate_model(checkpoint) == whole
    assert evaluate_model(checkpoint, data) == evaluate_model(run, data)
    assert (whole["seq_len"], whole["split"], whole["model"]["step"]) == (16, "val", 5)
    assert math.isfinite(whole["loss"])


def test_a_model_without_a_run_needs_a_text(run: Path, tiny_dataset: Dataset, tmp_path: Path) -> None:
    loaded = load_model(run, device="cpu")
    (tmp_path / "out").mkdir()
    hf.write_folder(loaded, exported_tokenizer(loaded), tmp_path / "out", "float32")
    with pytest.raises(DataError, match="belongs to no run") as caught:
        evaluate_model(tmp_path / "out")
    assert "--data" in caught.value.fix
    found = evaluate_model(tmp_path / "out", str(tiny_dataset.root))
    assert found["seq_len"] == 64  # the default, cut to the model's context


def test_text_that_training_used_is_not_called_held_out(
    train_tiny: TrainTiny, tiny_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ka lo mi tu ne " * 200, encoding="utf-8")
    prepared, run = tmp_path / "prepared", tmp_path / "run"
    prepare_text(prepared, Text((str(text),), val_fraction=0.0), tiny_tokenizer)
    train_tiny(run, 2, "sampling.every=0", data=str(prepared))
    with pytest.raises(DataError, match="no held-out text: all of it was trained on") as refused:
        evaluate_model(run)
    assert f"--data {prepared}" in refused.value.fix
    (tmp_path / "other.txt").write_text("tu ne ka " * 50, encoding="utf-8")
    for data, split in ((prepared, "train"), (text, "train"), (tmp_path / "other.txt", "all")):
        assert evaluate_model(run, str(data))["split"] == split
    assert resmol(["evaluate", str(run), "--data", str(text)], debug=True) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"loss of {run} on text that its training used\n")
    assert "{" not in shown, "a Python dictionary"


def test_negative_sizes_are_refused(run: Path) -> None:
    with pytest.raises(UsageError, match="must not be negative"):
        evaluate_model(run, windows=-1)


@pytest.mark.parametrize("begin", ["", "ka", "<|endoftext|>"])
@pytest.mark.parametrize("seq_len", [64, 8])
def test_documents_begin_as_the_models_tokenizer_says(
    begin: str, seq_len: int, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    """Against transformers: a document by itself; its beginning is read and not predicted, and may be the end token."""
    model = reference(vocab_size=512, initializer_range=0.5).eval()
    model.save_pretrained(tmp_path / "hf")
    rust = RustTokenizer.from_str(tiny_tokenizer.data.decode())
    if begin:
        named = [(begin, rust.token_to_id(begin))]
        rust.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=named)
    rust.save(str(tmp_path / "hf" / "tokenizer.json"))
    texts = ["ka lo mi", "lo", "mi ka 12 ka"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = evaluate_model(tmp_path / "hf", str(tmp_path / "text.jsonl"), seq_len=seq_len)

    documents = [[*rust.encode(text).ids, 0] for text in texts]
    # Without a beginning, a document's first token is predicted from all of the document before it.
    following = [[] if begin else ids[:1] for ids in documents[1:]] + [[]]
    losses = [
        loss
        for ids, first in zip(documents, following, strict=True)
        for loss in cross_entropies(model, ids if first else ids[:-1], ids[1:] + first)
    ]
    unpredicted = 0 if begin else len(tiny_tokenizer.token_bytes(documents[0][0]))
    assert (done["tokens"], done["bytes"]) == (len(losses), sum(map(len, texts)) - unpredicted)
    if seq_len == 64:  # a shorter window cuts the context of a document
        assert done["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def cross_entropies(model: Any, inputs: list[int], targets: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([inputs])).logits[0]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none").tolist()


def test_a_text_with_a_token_that_the_model_has_no_row_for_is_refused(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    reference(vocab_size=512).save_pretrained(tmp_path / "hf")
    rust = RustTokenizer.from_str(tiny_tokenizer.data.decode())
    rust.add_special_tokens(["[PAD]"])
    rust.save(str(tmp_path / "hf" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("ka lo [PAD] mi")
    with pytest.raises(DataError, match="the text holds the token 512, and the model has 512 rows"):
        evaluate_model(tmp_path / "hf", str(tmp_path / "text.txt"))


def test_a_folder_that_another_tokenizer_prepared_is_said(
    tmp_path: Path, tiny_tokenizer: Tokenizer, tiny_dataset: Dataset, messages: list[str]
) -> None:
    reference(vocab_size=512).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes(tiny_tokenizer.data)
    evaluate_model(tmp_path / "hf", str(tiny_dataset.root), windows=1)
    assert not messages
    (tmp_path / "hf" / "tokenizer.json").write_bytes(tiny_tokenizer.data + b"\n")
    evaluate_model(tmp_path / "hf", str(tiny_dataset.root), windows=1)
    assert any("was prepared with another tokenizer.json" in line for line in messages)
