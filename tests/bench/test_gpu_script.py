"""`make gpu` cannot fail on a typo: every part runs at a toy's size on the processor."""

from __future__ import annotations

from pathlib import Path

import gpu
import pytest

from resmol.data.tokenizer import Tokenizer


def test_every_part_runs_at_a_toys_size(tokenizer_in_cache: Tokenizer, tmp_path: Path) -> None:
    results = {}
    for name, part in gpu.PARTS.items():
        results[name] = {"outcome": "measured", "seconds": 1.0, "found": part.measure(gpu.DRY, tmp_path)}
    resumed, parity, times = (results[name]["found"] for name in ("resume", "parity", "determinism"))
    assert resumed["equal"] == resumed["tensors"] > 30
    assert parity["float32"]["between"] < 1e-5 < parity["bfloat16"]["ours"] < 0.05
    assert times["reproducible"]["loss_bits"] == times["reproducible again"]["loss_bits"]
    page = gpu.table(results)
    assert "tensors of a checkpoint are equal, bit for bit, after 8 + 4 steps and after 12" in page
    assert page.count("| resmol |") == 2


def test_a_part_that_fails_or_hangs_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(name: str, _folder: Path, seconds: float, *, dry: bool) -> dict[str, object]:
        assert dry
        return {"outcome": "measured", "seconds": 1.0, "found": {"device": "cpu"}} if name == "facts" else slow

    slow = {"outcome": "took more than 9 s", "seconds": 9.0}
    monkeypatch.setattr(gpu, "measure_apart", measured)
    assert set(gpu.measure_all(tmp_path, 60, dry=True)) == set(gpu.PARTS)
    assert (tmp_path / "performance-gpu.md").read_text().count("took more than 9 s") == len(gpu.PARTS) - 1
    assert gpu.measure_apart.__name__ == "measured"


def test_no_part_is_begun_when_time_is_over(tmp_path: Path) -> None:
    assert gpu.measure_apart("facts", tmp_path, 0.0, dry=True) == {"outcome": "no time was left"}
