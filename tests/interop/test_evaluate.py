"""Held-out loss: a checkpoint is measured as its run is, whatever names it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tiny import TrainTiny

from resmol.data.shards import Dataset
from resmol.errors import DataError, UsageError
from resmol.interop.evaluate import evaluate_model
from resmol.interop.export import hf
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
    hf.write_folder(loaded, tmp_path / "out", "float32")
    with pytest.raises(DataError, match="belongs to no run") as caught:
        evaluate_model(tmp_path / "out")
    assert "--data" in caught.value.fix
    found = evaluate_model(tmp_path / "out", str(tiny_dataset.root))
    assert found["seq_len"] == 64  # the default, cut to the model's context


def test_negative_sizes_are_refused(run: Path) -> None:
    with pytest.raises(UsageError, match="must not be negative"):
        evaluate_model(run, windows=-1)
