"""The update equals PyTorch's own AdamW on mean gradients, clipped by PyTorch's own function."""

from __future__ import annotations

import copy

import pytest
import torch

from resmol.config.run_config import OptimizerConfig, RunConfig
from resmol.model.llama import CausalLM
from resmol.train.optimizer import apply_update, build_optimizer, gradient_norm


def with_gradients(config: RunConfig, seed: int, scale: float) -> CausalLM:
    model = CausalLM(config.model)
    model.init_weights(1)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    return model


@pytest.mark.parametrize("decay", ["all", "matrices"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e9])
def test_equals_the_plain_sequence_of_operations(tiny_config: RunConfig, decay: str, clip_norm: float) -> None:
    config = OptimizerConfig(weight_decay=0.1, decay=decay, clip_norm=clip_norm)
    ours, theirs = CausalLM(tiny_config.model), CausalLM(tiny_config.model)
    ours.init_weights(1)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    matrices = [p for p in theirs.parameters() if p.dim() > 1 or decay == "all"]
    norms = [p for p in theirs.parameters() if not (p.dim() > 1 or decay == "all")]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        foreach=False,
    )
    optimizer = build_optimizer(ours, config)
    for step in range(1, 6):
        tokens, lr = 100 + step, 1e-3 * step
        source = with_gradients(tiny_config, step, 3.0)
        for mine, other, given in zip(ours.parameters(), theirs.parameters(), source.parameters(), strict=True):
            assert given.grad is not None
            mine.grad, other.grad = given.grad.clone(), given.grad / tokens
        norm = gradient_norm(ours, tokens)
        total = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm or float("inf"))
        torch.testing.assert_close(norm, total, rtol=1e-5, atol=0)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        apply_update(optimizer, lr=lr, tokens=tokens, norm=norm, clip_norm=clip_norm)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-7)
            assert mine.grad is None


def test_every_parameter_is_updated_once(tiny_config: RunConfig) -> None:
    model = CausalLM(tiny_config.model)
    groups = build_optimizer(model, OptimizerConfig(decay="matrices")).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert all(p.dim() == 1 for p in groups[1]["params"])


def test_the_norm_of_a_large_matrix_is_that_in_float64(tiny_config: RunConfig) -> None:
    """Millions of squares are added up in float32: PyTorch's own norm of such a matrix is off by over 1e-3."""
    model = CausalLM(tiny_config.model)
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(49152, 576, generator=generator)
    model.model.norm.weight = torch.nn.Parameter(matrix)
    model.model.norm.weight.grad = matrix
    assert float(gradient_norm(model, 7)) == pytest.approx(float(matrix.double().norm()) / 7, rel=1e-4)
