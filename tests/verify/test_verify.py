"""`verify` passes on the healthy model, and each mistake that is put in makes the named check fail."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resmol.checks import Check, all_passed
from resmol.config.load import load_preset
from resmol.config.model_config import ModelConfig
from resmol.config.run_config import RunConfig
from resmol.model import llama as module
from resmol.model.cross_entropy import IGNORE_INDEX
from resmol.model.linear import MatmulBackend, onednn_product, set_matmul_backend
from resmol.model.llama import CausalLM
from resmol.model.shapes import tensor_shapes
from resmol.verify import verify
from resmol.verify.capture import capture, reference_forward
from resmol.verify.parity import baseline, parity, rms, sequences
from resmol.verify.reference import arranged, arrangements, float64_reference, reference_model
from resmol.verify.rope import rotation_checks
from resmol.verify.sanity import finite

BACKENDS: list[MatmulBackend] = ["mkl", "onednn"]


@pytest.fixture(scope="module")
def config(tiny_config: RunConfig) -> ModelConfig:
    """Large enough for every check: 3:1 heads, 512 tokens, a context beyond 2048."""
    return tiny_config.model.model_copy(update={"max_position_embeddings": 4096, "initializer_range": 24**-0.5})


def fresh(config: ModelConfig) -> CausalLM:
    model = CausalLM.empty(config)
    model.init_weights(8)
    return model


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def test_the_healthy_model_passes_and_every_check_explains_itself(config: ModelConfig) -> None:
    checks = verify(config)
    assert all_passed(checks), failed(checks)
    assert all(check.guards and check.expected and check.measured for check in checks)
    assert len({check.name for check in checks}) == len(checks)


def assert_passes_with_either_library(config: ModelConfig, seeds: int) -> None:
    for seed in range(seeds):
        model = CausalLM.empty(config)
        model.init_weights(seed)
        for backend in BACKENDS:
            set_matmul_backend(model, backend)
            assert all_passed(checks := parity(model)), (seed, backend, failed(checks))


def test_the_verdict_does_not_depend_on_the_library_or_the_seed(config: ModelConfig) -> None:
    """Long sums, in which the libraries round differently: an SwiGLU of 3072."""
    assert_passes_with_either_library(config.model_copy(update={"intermediate_size": 3072}), seeds=2)


@pytest.mark.slow
def test_twenty_seeds_pass_with_either_library() -> None:
    assert_passes_with_either_library(load_preset("nano").model, seeds=20)


def test_right_arrangements_give_other_bits_and_the_largest_error_counts(config: ModelConfig) -> None:
    """Else the tolerance would measure one library, and call a right model wrong on a processor that uses the other."""
    wide = config.model_copy(update={"intermediate_size": 3072})
    model, ids = fresh(wide), sequences(wide)
    reference, exact = reference_model(wide, model.state_dict()), float64_reference(wide, model.state_dict())
    x, weight = torch.randn(5, 576), torch.randn(96, 576)
    found: dict[Any, Tensor] = {}
    for way in (ways := arrangements(torch.float32)):
        with arranged(reference, way):
            found[way] = capture(reference, ids, reference_forward(reference))["logits"]
            is_onednn = torch.equal(F.linear(x, weight), onednn_product(x, weight))
            assert is_onednn or way.matmul_backend == "mkl"
    assert {way.attention for way in ways} == {"sdpa", "eager"}
    assert {way.matmul_backend for way in ways} == set(BACKENDS)
    assert {way.threads for way in ways} >= {1, 2}
    assert not torch.equal(found[ways[0]], found[ways[1]])
    errors = [rms(logits.double() - exact(ids).logits) for logits in found.values()]
    assert baseline(wide, model.state_dict()).reference_errors["logits"] == max(errors)


@pytest.mark.parametrize("name", ["smollm2-360m", "smollm2-1.7b"])
def test_larger_presets_have_the_published_names_and_shapes(name: str) -> None:
    config = load_preset(name).model
    with torch.device("meta"):
        model = CausalLM(config)
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items() if key != "lm_head.weight"}
    assert shapes == tensor_shapes(config)


# --- what is put in here, the checks must find; tests/mistakes holds the mistakes of other reproductions --------


def interleaved_rotation(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Pairs (2i, 2i + 1), with tables laid out for pairs (i, i + Dh/2): not a rotation."""
    cos, sin = (table.to(x.dtype) for table in rotation)
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


def gate_and_up_exchanged(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(F.silu(self.up_proj(x)) * self.gate_proj(x))


def test_gate_and_up_exchanged(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resmol.model.llama.MLP.forward", gate_and_up_exchanged)
    assert "logits" in failed(verify(config))


def test_the_student_projects_rotation_does_not_keep_lengths(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own check compared key names, and passed."""
    monkeypatch.setattr("resmol.model.llama.rotate", interleaved_rotation)
    assert {"rotation keeps lengths", "rotation is relative"} <= failed(rotation_checks(config))


def test_a_rotation_with_nan_at_some_positions_fails(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second call: max() and min() then meet a number before each NaN, and keep it."""
    genuine = module.rotate
    seen: list[int] = []

    def broken(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(1)
        turned = genuine(x, rotation)
        return turned * torch.nan if len(seen) % 2 == 0 else turned

    monkeypatch.setattr("resmol.model.llama.rotate", broken)
    assert failed(rotation_checks(config)) == {"rotation keeps lengths", "rotation is relative", "rotation angles"}


def test_labels_shifted_twice(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = CausalLM.loss

    def shifted(self: CausalLM, ids: Tensor, targets: Tensor, **options: Any) -> Tensor:
        kept = int((targets != IGNORE_INDEX).sum())
        targets = F.pad(targets[:, 1:], (0, 1), value=IGNORE_INDEX)
        return genuine(self, ids, targets, **options) * kept / int((targets != IGNORE_INDEX).sum())

    monkeypatch.setattr(CausalLM, "loss", shifted)
    assert {"loss", "gradients"} <= failed(parity(fresh(config)))


def test_positions_that_start_over_after_the_prompt(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = module.rotation_tables

    def restarting(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        return genuine(positions - positions.min(), head_dim, theta)

    monkeypatch.setattr(module, "rotation_tables", restarting)
    assert {"key/value cache", "greedy tokens"} <= failed(verify(config))


def test_weights_that_are_not_numbers_are_named(config: ModelConfig) -> None:
    model = fresh(config)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    check = finite(model)
    assert not check.passed
    assert "model.layers.1.mlp.up_proj.weight" in check.measured


def test_given_weights_are_not_held_to_initial_statistics(config: ModelConfig) -> None:
    model = fresh(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    names = {check.name for check in verify(config, weights=model)}
    assert not {"first loss", "initial weights"} & names
