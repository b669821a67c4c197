"""The update equals PyTorch's own AdamW on mean gradients, clipped by PyTorch's own function."""

from __future__ import annotations

import copy
from typing import Literal

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


def reference_optimizers(model: CausalLM, name: str, decay: str) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return PyTorch's own optimizers of the parameters, and by what each learning rate is multiplied."""
    embedding = [p for n, p in model.named_parameters() if n == "model.embed_tokens.weight"]
    blocks = [p for n, p in model.named_parameters() if n.startswith("model.layers.") and n.endswith("proj.weight")]
    norms = [p for n, p in model.named_parameters() if n.endswith("norm.weight")]
    assert len(embedding) + len(blocks) + len(norms) == len(list(model.parameters()))

    def adamw(parameters: list[torch.nn.Parameter], weight_decay: float = 0.1) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, foreach=False)

    muon = torch.optim.Muon(blocks, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [
        (adamw(embedding), 3.0),
        (muon if name == "muon" else adamw(blocks), 1.0),
        (adamw(norms, 0.1 if decay == "all" else 0.0), 1.0),
    ]


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("decay", ["all", "matrices"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e9])
def test_equals_the_plain_sequence_of_operations(
    tiny_config: RunConfig, name: str, decay: str, clip_norm: float
) -> None:
    config = OptimizerConfig(name=name, weight_decay=0.1, decay=decay, clip_norm=clip_norm, embedding_lr_scale=3.0)
    ours, theirs = CausalLM(tiny_config.model), CausalLM(tiny_config.model)
    ours.init_weights(1)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    references = reference_optimizers(theirs, name, decay)
    optimizer = build_optimizer(ours, config, 100)
    for step in range(1, 6):
        tokens, lr = 100 + step, 1e-3 * step
        source = with_gradients(tiny_config, step, 3.0)
        for mine, other, given in zip(ours.parameters(), theirs.parameters(), source.parameters(), strict=True):
            assert given.grad is not None
            mine.grad, other.grad = given.grad.clone(), given.grad / tokens
        norm = gradient_norm(ours, float(tokens))
        total = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm or float("inf"))
        torch.testing.assert_close(norm, total, rtol=1e-5, atol=0)
        for reference, scale in references:
            for group in reference.param_groups:
                group["lr"] = lr * scale
            reference.step()
        apply_update(optimizer, lr=lr, divisor=float(tokens), norm=norm, clip_norm=clip_norm, is_finite=norm.isfinite())
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            # Muon computes in bfloat16, where a last bit of the gradient can be a step of 2^-8 in an update of 1e-3.
            torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-7 if name == "adamw" else 3e-5)
            assert mine.grad is None


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_numbers_that_are_not_finite_update_nothing(name: Literal["adamw", "muon"], tiny_config: RunConfig) -> None:
    """Neither the first step of a run nor a later one; the moments stay what they were."""
    model = CausalLM(tiny_config.model)
    optimizer = build_optimizer(model, OptimizerConfig(name=name), 32)
    ids = torch.arange(8).view(1, 8)
    for finite in (False, True, False):
        before = [tensor.clone() for tensor in _tensors(model, optimizer)]
        model.loss(ids, ids).backward()
        norm = gradient_norm(model, 8.0)
        apply_update(optimizer, lr=0.1, divisor=8.0, norm=norm, clip_norm=1.0, is_finite=torch.tensor(finite))
        assert optimizer.state
        after = _tensors(model, optimizer)
        if not before[len(list(model.parameters())) :]:  # there were no moments: now there are, of nothing
            assert not any(bool(tensor.any()) for tensor in after[len(before) :])
        assert all(map(torch.equal, before, after)) is not finite


def _tensors(model: CausalLM, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [*model.parameters(), *(tensor for state in optimizer.state.values() for tensor in state.values())]


def test_every_parameter_is_updated_once(tiny_config: RunConfig) -> None:
    model = CausalLM(tiny_config.model)
    for name in ("adamw", "muon"):
        config = OptimizerConfig(name=name, decay="matrices", embedding_lr_scale=2.0)
        groups = build_optimizer(model, config, 100).param_groups
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_the_half_life_is_that_of_the_step(tiny_config: RunConfig) -> None:
    config = OptimizerConfig(beta2_halflife_tokens=6400)
    (group,) = build_optimizer(CausalLM(tiny_config.model), config, 640).param_groups
    assert group["betas"][1] ** 10 == pytest.approx(0.5)


def test_the_norm_of_a_large_matrix_is_that_in_float64(tiny_config: RunConfig) -> None:
    """Millions of squares are added up in float32: PyTorch's own norm of such a matrix is off by over 1e-3."""
    model = CausalLM(tiny_config.model)
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(49152, 576, generator=generator)
    model.model.norm.weight = torch.nn.Parameter(matrix)
    model.model.norm.weight.grad = matrix
    assert float(gradient_norm(model, 7.0)) == pytest.approx(float(matrix.double().norm()) / 7, rel=1e-4)
