"""The table of an ablation: what it compares, what it refuses, and what it does not claim."""

from __future__ import annotations

import itertools
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from resmol.bench.ablate import CONTROL, Ablation, ablate
from resmol.bench.comparison import Comparison
from resmol.bench.subprocess_runs import measure_training
from resmol.bench.workers.main import Metrics
from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed, ConfigError, UsageError

FACTOR = ("runtime.attention=sdpa,eager",)


def pretend(speeds: dict[str, list[float]]) -> Any:
    """A measurer that gives each attention its speeds in turn; the control shares the first one's."""

    def measure(config: RunConfig, *_: Any) -> Metrics:
        rates = speeds[config.runtime.attention]
        rates.append(rates.pop(0))
        return {"tokens_per_second": rates[-1], "peak_bytes": 1 << 20, "loss": 2.5, "loss_bits": "40200000"}

    return measure


def table_of(result: Comparison) -> str:
    text = StringIO()
    result.render(Console(file=text, width=200))
    return text.getvalue()


def test_rows_are_the_combinations_and_a_control(tiny_config: RunConfig) -> None:
    rows = Ablation(tiny_config, (*FACTOR, "runtime.loss_chunk_tokens=8,16,32")).overrides()
    assert len(set(rows)) == 6
    assert rows[0] == ("runtime.attention=sdpa", "runtime.loss_chunk_tokens=8")


def test_the_last_row_is_the_first_one_again(tiny_config: RunConfig, tiny_dataset: Dataset) -> None:
    seen: list[str] = []

    def measure(config: RunConfig, *rest: Any) -> Metrics:
        seen.append(config.runtime.attention)
        return pretend({"sdpa": [100.0], "eager": [100.0]})(config, *rest)

    result = ablate(Ablation(tiny_config, FACTOR, str(tiny_dataset.root), repeats=2), measure)
    names = [row.name for row in result.variants]
    assert names == ["runtime.attention=sdpa", "runtime.attention=eager", CONTROL]
    assert sorted(seen) == ["eager"] * 2 + ["sdpa"] * 4


def test_without_factors_each_usual_setting_is_changed_by_itself(tiny_config: RunConfig) -> None:
    assert Ablation(tiny_config).overrides() == [
        (),
        ("runtime.attention=eager",),
        ("runtime.precision=bfloat16",),
        ("runtime.compile=on",),
        ("model.tie_word_embeddings=false",),
    ]


def test_all_impossible_variants_are_named_before_anything_runs(tiny_config: RunConfig) -> None:
    def never(*_: Any) -> Metrics:
        raise AssertionError("something ran")

    with pytest.raises(ConfigError) as error:
        ablate(Ablation(tiny_config, ("runtime.attention=sdpa,flash,warp",)), never)
    assert "flash" in error.value.what
    assert "warp" in error.value.what


@pytest.mark.parametrize("factor", ["runtime.attention", "runtime.attention=", "runtime.attention=sdpa,"])
def test_what_is_no_factor_is_refused(tiny_config: RunConfig, factor: str) -> None:
    with pytest.raises(UsageError, match="factor"):
        Ablation(tiny_config, (factor,)).overrides()


def test_too_many_combinations_are_refused(tiny_config: RunConfig) -> None:
    many = ",".join(map(str, range(1, 40)))
    with pytest.raises(UsageError, match="39 variants"):
        Ablation(tiny_config, (f"runtime.loss_chunk_tokens={many}",)).overrides()


def test_a_difference_is_stated_with_its_interval(tiny_config: RunConfig, tiny_dataset: Dataset) -> None:
    speeds = {"sdpa": [100.0, 101.0, 99.0], "eager": [50.0, 50.5, 49.5]}
    result = ablate(Ablation(tiny_config, FACTOR, str(tiny_dataset.root)), pretend(speeds))
    assert result.verdict(result.variants[1]).startswith("0.50x (0.49 to 0.51): slower by ")
    assert "slower by" in table_of(result)
    assert result.to_dict()["rows"][1]["measurements"][0]["tokens_per_second"] in (50.0, 50.5, 49.5)


def test_a_noisy_machine_gets_no_verdict(tiny_config: RunConfig, tiny_dataset: Dataset) -> None:
    speeds = {"sdpa": [100.0, 60.0, 140.0, 75.0, 120.0, 90.0, 50.0], "eager": [50.0, 90.0]}
    result = ablate(Ablation(tiny_config, FACTOR, str(tiny_dataset.root)), pretend(speeds))
    assert ": no verdict" in result.verdict(result.variants[1])
    assert "too noisy" in table_of(result)


def test_losses_that_differ_between_the_first_row_and_its_control_are_reported(
    tiny_config: RunConfig, tiny_dataset: Dataset
) -> None:
    count = itertools.count()

    def measure(config: RunConfig, *rest: Any) -> Metrics:
        return {**pretend({"sdpa": [100.0], "eager": [100.0]})(config, *rest), "loss_bits": str(next(count))}

    result = ablate(Ablation(tiny_config, FACTOR, str(tiny_dataset.root)), measure)
    assert "not deterministic" in table_of(result)


def test_an_interrupted_ablation_shows_what_it_has(tiny_config: RunConfig, tiny_dataset: Dataset) -> None:
    left, genuine = [7], pretend({"sdpa": [100.0], "eager": [100.0]})

    def interrupted(*arguments: Any) -> Metrics:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return genuine(*arguments)

    result = ablate(Ablation(tiny_config, FACTOR, str(tiny_dataset.root)), interrupted)
    assert not result.complete
    assert result.rounds == 2
    assert "interrupted" in table_of(result)


def test_a_real_measurement(
    tiny_config: RunConfig, tiny_dataset: Dataset, tokenizer_in_cache: Tokenizer, tmp_path: Path
) -> None:
    """Identical variants come to identical losses; an untied model is another one."""
    Path(tmp_path / "run").mkdir()  # whatever an earlier measurement left goes away
    configs = [with_overrides(tiny_config, overrides) for overrides in ([], [], ["model.tie_word_embeddings=false"])]
    found = [measure_training(config, tmp_path, str(tiny_dataset.root), 3, 1) for config in configs]
    assert found[0]["loss_bits"] == found[1]["loss_bits"] != found[2]["loss_bits"]
    assert all(m["tokens_per_second"] > 0 and m["peak_bytes"] > 50 << 20 for m in found)


def test_a_process_that_fails_says_why(tiny_config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="a measured process failed"):
        measure_training(tiny_config, tmp_path, str(tmp_path / "nothing"), 1, 0)
