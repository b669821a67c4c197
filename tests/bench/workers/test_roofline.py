"""The matmuls of a step are all of them: their operations are the counted ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from resmol.bench.workers import roofline
from resmol.bench.workers.roofline import Matmul, forward_matmuls, matmul_seconds, training_matmuls
from resmol.config.load import load_preset
from resmol.model.flops import forward_flops_per_token, training_flops_per_token
from resmol.model.linear import has_onednn


@pytest.mark.parametrize("preset", ["nano", "smollm2-135m"])
@pytest.mark.parametrize(("rows", "seq_len"), [(1, 128), (2, 512), (3, 2048)])
def test_operations_are_those_of_the_counts(preset: str, rows: int, seq_len: int) -> None:
    model, tokens = load_preset(preset).model, rows * seq_len
    forward = sum(matmul.operations for matmul in forward_matmuls(model, rows, seq_len))
    step = sum(matmul.operations for matmul in training_matmuls(model, rows, seq_len))
    assert forward == pytest.approx(tokens * forward_flops_per_token(model, seq_len))
    assert step == pytest.approx(tokens * training_flops_per_token(model, seq_len))


@pytest.mark.parametrize("role", ["gate, up", "gate, up: by input", "gate, up: by weight", "scores", "mixed values"])
@pytest.mark.parametrize("batch", [0, 3])
def test_every_layout_can_be_multiplied(role: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SECONDS_PER_MATMUL", 0.0)
    assert matmul_seconds(Matmul(role, batch, 5, 7, 11, 1), torch.float32) > 0


def test_the_roofline_of_generation_is_bandwidth_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_preset("nano").model
    monkeypatch.setattr(roofline, "bandwidth", lambda: {"read_bytes_per_second": 1e9, "update_bytes_per_second": 1e9})
    monkeypatch.setattr(roofline, "sum_seconds", lambda matmuls, dtype: (2.0, []))
    found = roofline.generation_roofline(model, 2, 10, 20, torch.float32)
    cache = 2 * 20 * 2 * 4 * 1 * 16 * 4  # rows, mean context, key and value, blocks, heads, head size, bytes
    assert found["tokens_per_second"] == pytest.approx(2 * 1e9 / (2_458_032 * 4 + cache))
    assert found["prefill_per_second"] == pytest.approx(10.0)


@pytest.mark.skipif(not has_onednn(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("role", ["gate, up", "gate, up: by input", "gate, up: by weight"])
def test_a_matmul_counts_as_fast_as_its_faster_library(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[torch.Tensor] = []

    def timed(work: Callable[[], torch.Tensor]) -> float:
        results.append(work())
        return 3.0 - len(results)

    monkeypatch.setattr(roofline, "best_seconds", timed)
    assert matmul_seconds(Matmul(role, 0, 12, 20, 28, 1), torch.float32) == 1.0
    torch.testing.assert_close(results[0], results[1])  # the same matmul, by both
    assert results[0].shape == (12, 28)
