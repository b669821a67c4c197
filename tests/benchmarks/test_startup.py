"""The measurement of start times: it ends, and the first step ends within its process."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from startup import first_step_metrics, python_metrics, startup_comparisons

from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed
from resmol.run.directory import RunDir
from resmol.run.ledger import effective_steps, read_ledger


def test_starts_are_timed(
    tiny_config: RunConfig, tiny_dataset: Dataset, tokenizer_in_cache: Tokenizer, tmp_path: Path
) -> None:
    for comparison in startup_comparisons(tiny_config, tmp_path, str(tiny_dataset.root)):
        comparison.run(1, 0)
        assert all(one.values("seconds")[0] > 0 for one in comparison.variants)


def test_the_first_step_ends_within_its_process(
    tiny_config: RunConfig, tiny_dataset: Dataset, tokenizer_in_cache: Tokenizer, tmp_path: Path
) -> None:
    started = time.perf_counter()
    seconds = first_step_metrics(tiny_config, tmp_path, str(tiny_dataset.root))["seconds"]
    step = effective_steps(read_ledger(RunDir(tmp_path / "run").ledger).records)[1]
    assert step["seconds"] < seconds < time.perf_counter() - started


def test_a_start_that_fails_is_no_measurement() -> None:
    with pytest.raises(CheckFailed, match="no such thing"):
        python_metrics(["-c", "raise SystemExit('no such thing')"])
