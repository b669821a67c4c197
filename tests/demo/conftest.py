"""A tiny run with a context that is long enough to be stopped in, and a demo that serves it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served, slow_demo

from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.demo.space import export_space
from resmol.interop.load import LoadedModel, load_model
from resmol.run.directory import RunDir
from resmol.train.start import train_model


@pytest.fixture(scope="session")
def demo_run(
    tiny_config: RunConfig, tiny_dataset: Dataset, tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("demo") / "tiny-run"
    changes = ["train.steps=12", "model.max_position_embeddings=1024", "sampling.every=0"]
    train_model(tiny_config, run, data=str(tiny_dataset.root), tokenizer=tiny_tokenizer.path, overrides=changes)
    claim = {"name": "it <generates>", "passed": True, "measured": "{{x}} ${y}", "evidence": "a/tiny-run/ledger.jsonl"}
    RunDir(run).evidence.mkdir()
    (RunDir(run).evidence / "claims.json").write_text(json.dumps({"checks": [claim]}))
    return run


@pytest.fixture(scope="session")
def demo_space(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as a Space; its export lies in ``model``."""
    return export_space(demo_run, tmp_path_factory.mktemp("space") / "space").path


@pytest.fixture(scope="session")
def demo_model(demo_run: Path) -> LoadedModel:
    return load_model(demo_run)


@pytest.fixture(scope="module")
def served(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A demo that writes about fifty tokens a second."""
    with slow_demo(demo_run, tmp_path_factory.mktemp("served"), delay=0.02) as demo:
        yield demo
