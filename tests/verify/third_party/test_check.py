"""A third-party implementation: a right one passes, and the mistake of a wrong one is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from resmol.checks import Check, all_passed
from resmol.config.load import load_preset
from resmol.config.model_config import ModelConfig
from resmol.model.llama import CausalLM, SelfAttention, attend
from resmol.model.shapes import tensor_shapes
from resmol.verify import verify_third_party

pytestmark = pytest.mark.usefixtures("computed_once")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    small = {"vocab_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 4096, "initializer_range": 48**-0.5}
    return load_preset("nano").model.model_copy(update=small)


class StudentAttention(SelfAttention):
    """The original student's attention, written anew: it turns neighbors (2i, 2i + 1) by tables for (i, i + Dh/2)."""

    def forward(self, x: Tensor, rotation: Any, mask: Any, cache: Any) -> Tensor:
        query, key, value = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = (table.to(query.dtype) for table in rotation)

        def turned(heads: Tensor) -> Tensor:
            neighbors = torch.stack((-heads[..., 1::2], heads[..., ::2]), dim=-1).flatten(-2)
            return heads * cos + neighbors * sin

        return self.o_proj(attend(turned(query), turned(key), value, mask, "sdpa").transpose(1, 2).flatten(2))


class TheirModel(nn.Module):
    """Another layout of the same parts: everything below ``net``, and logits as the only output."""

    def __init__(self, config: ModelConfig, attention: type[SelfAttention]) -> None:
        super().__init__()
        self.net = CausalLM(config)
        for layer in self.net.model.layers:
            layer.self_attn.__class__ = attention

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(ids)


def student(config: ModelConfig) -> nn.Module:
    model = CausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.__class__ = StudentAttention
    return model


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def test_the_reference_itself_passes(config: ModelConfig) -> None:
    checks = verify_third_party(lambda shape: LlamaForCausalLM(LlamaConfig(**shape)), config)
    assert all_passed(checks), failed(checks)


def layout(config: ModelConfig) -> TheirModel:
    return TheirModel(config, SelfAttention)


def test_names_can_be_mapped(config: ModelConfig) -> None:
    checks = verify_third_party(
        layout,
        config,
        {f"net.{name}": name for name, _ in CausalLM(config).named_parameters()},
    )
    assert not failed(checks) & {"logits", "gradients", "loss", "causality"}, failed(checks)


def test_the_original_students_model_is_called_wrong_and_told_why(config: ModelConfig) -> None:
    """Its own check compared key names, printed a perfect score, and its logits were off by 37."""
    checks = verify_third_party(student, config)
    assert {"logits", "gradients", "diagnosis"} <= failed(checks)
    words = next(check.measured for check in checks if check.name == "diagnosis")
    assert "rotat" in words
    assert "norm of q changes by up to" in words


def test_what_cannot_be_run_is_an_answer_and_not_a_traceback(config: ModelConfig) -> None:
    class Broken(CausalLM):
        def forward(self, *_: Any, **__: Any) -> Tensor:
            raise ValueError("shapes do not fit")

    checks = verify_third_party(Broken, config)
    assert not all_passed(checks)
    assert (
        "could not be compared with SmolLM2's: it cannot be run: forward: ValueError: shapes do" in checks[-1].measured
    )


def test_missing_parameters_are_named(config: ModelConfig) -> None:
    checks = verify_third_party(lambda _: nn.Linear(2, 2), config)
    assert not all_passed(checks)
    missing = f"{len(tensor_shapes(config))} of Hugging Face's names are missing: model.embed_tokens.weight, "
    assert f"could not be compared with SmolLM2's: {missing}" in checks[-1].measured
