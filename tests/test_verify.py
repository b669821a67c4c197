"""`verify` passes on the healthy model, and each mistake that is put in makes the named check fail."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resmol import model as module
from resmol.checks import Check, all_passed
from resmol.config import RunConfig
from resmol.config_files import load_preset
from resmol.hf_config import ModelConfig
from resmol.model import CausalLM
from resmol.verify import verify
from resmol.verify.parity import parity
from resmol.verify.rotation import rotation_checks
from resmol.verify.sanity import expected_shapes, finite, sanity


@pytest.fixture(scope="module")
def config(tiny_config: RunConfig) -> ModelConfig:
    """Large enough for every check: 3:1 heads, 512 tokens, a context beyond 2048."""
    return tiny_config.model.model_copy(update={"max_position_embeddings": 4096, "initializer_range": 24**-0.5})


def fresh(config: ModelConfig) -> CausalLM:
    model = CausalLM.empty(config)
    model.initialise(8)
    return model


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def test_the_healthy_model_passes_and_every_check_explains_itself(config: ModelConfig) -> None:
    checks = verify(config)
    assert all_passed(checks), failed(checks)
    assert all(check.guards and check.expected and check.measured for check in checks)
    assert len({check.name for check in checks}) == len(checks)


@pytest.mark.parametrize("name", ["smollm2-360m", "smollm2-1.7b"])
def test_larger_presets_have_the_published_names_and_shapes(name: str) -> None:
    config = load_preset(name).model
    with torch.device("meta"):
        model = CausalLM(config)
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items() if key != "lm_head.weight"}
    assert shapes == expected_shapes(config)


# --- the mistakes of other reproductions, put into ours -------------------------------------------------------


def interleaved_rotation(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """MISTAKE 1: pairs (2i, 2i + 1), with tables laid out for pairs (i, i + Dh/2): not a rotation."""
    cos, sin = (table.to(x.dtype) for table in rotation)
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


def theta_by_default(positions: Tensor, head_dim: int, _theta: float) -> tuple[Tensor, Tensor]:
    """MISTAKE 2: theta defaulted to 10000."""
    return GENUINE_TABLES(positions, head_dim, 10_000.0)


def bfloat16_positions(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """MISTAKE 2: positions above 256 are rounded."""
    return GENUINE_TABLES(positions.bfloat16().to(positions.dtype), head_dim, theta)


def never_applied(x: Tensor, _rotation: tuple[Tensor, Tensor]) -> Tensor:
    """MISTAKE 2: rotation forgotten."""
    return x


def no_mask(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, _kind: str) -> Tensor:
    """MISTAKE 5: every position sees every other."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def inverted_documents(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    """MISTAKE 5: attention everywhere but inside the document."""
    if mask is None or mask.shape[-2] != mask.shape[-1]:
        return GENUINE_ATTEND(query, key, value, mask, kind)
    inverted = ~mask | torch.eye(mask.shape[-1], dtype=torch.bool)
    return GENUINE_ATTEND(query, key, value, inverted, kind)


def scaled_twice(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    """MISTAKE 16: the scores are divided by the root of the head size twice."""
    return GENUINE_ATTEND(query / math.sqrt(query.shape[-1]), key, value, mask, kind)


def repeated_along_the_wrong_axis(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    """MISTAKE 17: heads a b c a b c instead of a a b b c c."""
    groups = query.shape[1] // key.shape[1]
    return GENUINE_ATTEND(query, key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1), mask, kind)


def epsilon_outside(self: Any, x: Tensor) -> Tensor:
    """MISTAKE 16: epsilon is added to the root."""
    wide = x.float()
    return self.weight * (wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)).to(x.dtype)


def norm_in_half_precision(self: Any, x: Tensor) -> Tensor:
    """MISTAKE 16: the mean of squares in bfloat16."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def gate_and_up_exchanged(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(F.silu(self.up_proj(x)) * self.gate_proj(x))


GENUINE_TABLES, GENUINE_ATTEND = module.rotation_tables, module.attend


@pytest.mark.parametrize(
    ("target", "mutant", "caught_by"),
    [
        ("rotate", interleaved_rotation, {"logits", "gradients", "twins, float32"}),
        ("rotation_tables", theta_by_default, {"logits", "late positions"}),
        ("rotation_tables", bfloat16_positions, {"late positions"}),
        ("rotate", never_applied, {"logits", "late positions"}),
        ("attend", no_mask, {"causality", "logits"}),
        ("attend", inverted_documents, {"document mask"}),
        ("attend", scaled_twice, {"logits"}),
        ("attend", repeated_along_the_wrong_axis, {"twins, float32", "twins, bfloat16"}),
        ("RMSNorm.forward", epsilon_outside, {"twins, float32"}),
        ("RMSNorm.forward", norm_in_half_precision, {"norm in bfloat16"}),
        ("MLP.forward", gate_and_up_exchanged, {"logits"}),
    ],
)
def test_mistakes_are_caught(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, target: str, mutant: Callable[..., Any], caught_by: set[str]
) -> None:
    monkeypatch.setattr(f"resmol.model.{target}", mutant)
    found = failed(verify(config))
    uncaught = {wanted for wanted in caught_by if not any(name.startswith(wanted) for name in found)}
    assert not uncaught, found


@pytest.mark.parametrize("mutant", [interleaved_rotation])
def test_the_student_projects_rotation_does_not_keep_lengths(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, mutant: Callable[..., Any]
) -> None:
    """Its own check compared key names, and passed."""
    monkeypatch.setattr("resmol.model.rotate", mutant)
    assert {"rotation keeps lengths", "rotation is relative"} <= failed(rotation_checks(config))


def test_labels_shifted_twice(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    observe = importlib.import_module("resmol.verify.observe")  # the package has a function of that name
    genuine = observe.cross_entropy_sum

    def shifted(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        return genuine(hidden[:, :-1], weight, targets[:, 1:], chunk) * targets.shape[1] / (targets.shape[1] - 1)

    monkeypatch.setattr(observe, "cross_entropy_sum", shifted)
    assert {"loss", "gradients"} <= failed(parity(fresh(config)))


def test_untied_output_layer(config: ModelConfig) -> None:
    model = fresh(config)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert "tying" in failed(sanity(config, model, trained=False))


@pytest.mark.parametrize(("std", "caught_by"), [(1.0, {"initial weights", "first loss"}), (0.02, {"initial weights"})])
def test_wrong_initial_weights(config: ModelConfig, std: float, caught_by: set[str]) -> None:
    model = fresh(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std, generator=torch.Generator().manual_seed(0))
    assert caught_by <= failed(sanity(config, model, trained=False))


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
