"""The points of a scaling measurement: kept, not measured twice, and failures are results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scaling
from scaling import Scaling, known_points, measure_all, measure_point, numbers

from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import UsageError


def test_points_are_kept_and_failures_shown(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "load_preset", lambda _name: tiny_config)
    measured: list[int] = []

    def measure(_scaling: Any, config: RunConfig, *_: Any) -> dict[str, Any]:
        measured.append(config.data.seq_len)
        point = {"estimated_bytes": 1 << 20, "flops_per_token": 10**9}
        if config.data.seq_len == 64:
            return {**point, "outcome": "did not fit in memory"}
        return {**point, "outcome": "measured", "tokens_per_second": 50.0, "peak_bytes": 1 << 30, "step_seconds": [0.5]}

    points = Scaling(("tiny",), (64, 16, 128, 32), (1,))
    measure_all(points, tmp_path, "", tmp_path / "out", measure)
    assert measured == [16, 32, 64]  # the cheap ones first; 128 is beyond the context
    with (tmp_path / "out" / "points.jsonl").open("a", encoding="utf-8") as lines:
        lines.write('{"cut off')
    measure_all(points, tmp_path, "", tmp_path / "out", measure)
    assert measured == [16, 32, 64, 64]
    assert len(known_points(tmp_path / "out")) == 2
    written = (tmp_path / "out" / "scaling.md").read_text(encoding="utf-8")
    assert "| tiny | 1 x 16 | 0.500 | 50 | 1,024 | 1 | 1.000 | 50 |  |" in written
    assert "did not fit in memory" in written
    assert (tmp_path / "out" / "scaling.svg").read_text(encoding="utf-8").startswith("<svg")


def test_a_point_without_memory_is_a_result(
    tiny_config: RunConfig, tiny_dataset: Dataset, tokenizer_in_cache: Tokenizer, tmp_path: Path
) -> None:
    few = Scaling(("tiny",), (16,), (1,), memory_bytes=80 << 20)
    point = measure_point(few, tiny_config, tmp_path, str(tiny_dataset.root))
    assert point["outcome"] == "did not fit in memory"


@pytest.mark.parametrize(
    "wrong", [{"warmup": -1}, {"seconds": 0.0}, {"seconds": float("nan")}, {"seconds": -5.0}, {"memory_bytes": -1}]
)
def test_a_scaling_that_cannot_be_measured_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(wrong)).removesuffix('_bytes')}"):
        Scaling(("tiny",), (16,), (1,), **wrong)


def test_a_list_that_holds_something_else_is_refused() -> None:
    assert numbers("--lengths", "128,256") == (128, 256)
    with pytest.raises(UsageError, match="--lengths is '128,x'"):
        numbers("--lengths", "128,x")
