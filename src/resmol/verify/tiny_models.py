"""Tiny models of many shapes: a mistake that one shape hides shows in another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resmol.checks import Check
from resmol.config.model_config import ModelConfig
from resmol.model.flops import total_parameters
from resmol.model.llama import Attention, CausalLM
from resmol.verify.parity import (
    Precision,
    element_type,
    ids_for,
    parity,
    reference_errors,
    rms,
    rms_errors,
    tolerance,
)
from resmol.verify.reference import arrangements, float64_reference, reference_model

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "bfloat16 autocast")
LATE_LENGTH = 8192
LATE_POSITIONS = 64
# Larger random models are compared at reduced depth.
FULL_DEPTH_PARAMETERS = 200_000_000


class TinyShape(NamedTuple):
    """A shape: H query heads, K key/value heads, Dh, layers, F, V, tied, theta, epsilon."""

    heads: int
    key_value_heads: int
    head_dim: int
    layers: int
    ffn: int
    vocab: int
    tied: bool
    theta: float
    eps: float
    attention: Attention = "sdpa"

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        width = self.heads * self.head_dim
        return ModelConfig(
            vocab_size=self.vocab,
            hidden_size=width,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=512,
            rms_norm_eps=self.eps,
            rope_theta=self.theta,
            tie_word_embeddings=self.tied,
            initializer_range=width**-0.5,
            bos_token_id=0,
            eos_token_id=0,
        )

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        heads = f"{self.heads}:{self.key_value_heads} heads of {self.head_dim}"
        return f"{heads}, {tied}, theta {self.theta:g}, {self.attention}"


STANDARD: tuple[TinyShape, ...] = (
    TinyShape(4, 4, 8, 2, 48, 211, True, 10_000.0, 1e-5),
    TinyShape(3, 1, 16, 2, 64, 128, True, 100_000.0, 1e-5, "eager"),
    TinyShape(9, 3, 8, 3, 96, 211, True, 100_000.0, 1e-5),
    TinyShape(9, 1, 6, 2, 50, 97, False, 130_000.0, 1e-6, "eager"),
    TinyShape(6, 2, 10, 1, 37, 211, False, 500.0, 1e-2),
)
# Every way of sharing 12 heads; each shape changes the other settings, too.
FULL: tuple[TinyShape, ...] = STANDARD + tuple(
    TinyShape(12, shared, 2 * i + 2, i, 31 * i, 101 + i, i % 2 == 0, 10.0 ** (i + 1), 10.0**-i)
    for i, shared in enumerate((12, 6, 4, 3, 2, 1), start=1)
)


def fill(model: CausalLM, seed: int) -> CausalLM:
    """Draw weights, those of norms included: norms of 1 would hide one that is applied twice, or not at all."""
    model.init_weights(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()))
    return model


def tiny_model_parity(config: ModelConfig, shapes: tuple[TinyShape, ...] = STANDARD) -> list[Check]:
    """Compare tiny models in every precision, and the last positions of the longest context.

    A precision has one row, and a further one for each comparison that fails.
    """
    checks: list[Check] = []
    for precision in PRECISIONS:
        results = {f"{shape}: {check.name}": check for shape in shapes for check in _shape_parity(shape, precision)}
        failed = {name: check for name, check in results.items() if not check.passed}
        measured = f"{len(results) - len(failed)} of {len(results)} comparisons on {len(shapes)} shapes hold"
        row = f"tiny models, {precision.removeprefix('bfloat16 ')}"
        checks.append(Check(row, not failed, measured, "all of them", _GUARDS[precision]))
        checks += [replace(check, name=f"{precision}, {name}") for name, check in failed.items()]
    return [*checks, late_positions(config, "float32"), late_positions(config, "bfloat16")]


_GUARDS = {
    "float32": "Key/value heads repeated along the wrong axis, a size that is right by accident, a hard-coded epsilon "
    "or theta: mistakes that a single shape can hide.",
    "bfloat16": "Norms or a softmax that lose their float32: parity in float32 does not show it.",
    "bfloat16 autocast": "A type that autocast changes where it should not: training in bfloat16 runs under autocast.",
}


def _shape_parity(shape: TinyShape, precision: Precision) -> list[Check]:
    model = fill(CausalLM(shape.config, attention=shape.attention), seed=shape.heads)
    return parity(model.bfloat16() if precision == "bfloat16" else model, precision)


def late_positions(config: ModelConfig, precision: Precision) -> Check:
    """Compare the last positions of the longest context, on one tiny block with this theta."""
    model = fill(CausalLM(one_tiny_block(config)), seed=5)
    model = model.bfloat16() if precision == "bfloat16" else model
    return compare_late(model, model, min(config.max_position_embeddings, LATE_LENGTH), precision)


def compare_late(
    run: Callable[[Int[Tensor, "1 T"]], Float[Tensor, "1 T V"]], model: CausalLM, length: int, precision: Precision
) -> Check:
    """Compare the logits at the end of a long sequence.

    Args:
        run: The implementation; it has the weights of ``model``.
        model: Our model.
        length: T.
        precision: The arithmetic of both.
    """
    right = late_reference(model, length, precision)
    with torch.no_grad():
        error = rms_errors({"logits": _last(run(_late_ids(model, length)))}, {"logits": right.logits})["logits"]
    return Check(
        f"late positions, {precision}",
        error <= right.allowed < right.with_other_theta,
        f"error {error:.1e}; with another theta it would be {right.with_other_theta:.1e}",
        f"at most {right.allowed:.1e} (from the reference's own) at positions {max(0, length - LATE_POSITIONS)} to "
        f"{length - 1}",
        "Theta left at the library's default of 10000, or positions rounded to bfloat16 (from 256 on, neighbors become "
        "the same position): both look right on short texts.",
    )


class LateReference(NamedTuple):
    """What is right at the end of a long sequence, and the errors that go with it.

    Attributes:
        logits: The last ones, in float64.
        allowed: The largest error, from the reference's own.
        with_other_theta: The error of the same weights with another theta, which the comparison must tell apart.
    """

    logits: Float[Tensor, "1 last V"]
    allowed: float
    with_other_theta: float


@torch.no_grad()
def late_reference(model: CausalLM, length: int, precision: Precision) -> LateReference:
    """Compute the end of a long sequence with transformers, and with our model's weights and another theta."""
    ids = _late_ids(model, length)
    exact = {"logits": _last(float64_reference(model.config, model.state_dict())(ids).logits)}
    reference = reference_model(model.config, model.state_dict())
    fused = [way for way in arrangements(element_type(precision)) if way.attention == "sdpa"]  # eager holds T x T
    theirs = reference_errors(reference, lambda _: {"logits": _last(reference(ids).logits)}, exact, fused)
    allowed = tolerance(theirs["logits"], rms(exact["logits"]), precision)
    wrong = rms_errors({"logits": _with_other_theta(model, ids)}, exact)["logits"]
    return LateReference(exact["logits"], allowed, wrong)


def shallow(config: ModelConfig) -> ModelConfig:
    """Return the architecture with as many layers as a quick check can afford; further blocks add nothing new."""
    while total_parameters(config) > FULL_DEPTH_PARAMETERS and config.num_hidden_layers > 1:
        config = config.model_copy(update={"num_hidden_layers": config.num_hidden_layers // 2})
    return config


def one_tiny_block(config: ModelConfig) -> ModelConfig:
    """Return one tiny block with the theta, epsilon and context of an architecture."""
    change = {
        "vocab_size": max(97, config.bos_token_id + 1, config.eos_token_id + 1),
        "hidden_size": 48,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "initializer_range": 48**-0.5,
    }
    return config.model_copy(update=change)


def two_tiny_blocks(config: ModelConfig) -> ModelConfig:
    """Return two tiny blocks with an architecture's ratio of heads, and more than one key/value head."""
    common = math.gcd(config.num_attention_heads, config.num_key_value_heads)
    heads, shared = (2 * count // common for count in (config.num_attention_heads, config.num_key_value_heads))
    change = {"hidden_size": 16 * heads, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": heads}
    change |= {"num_key_value_heads": shared}
    return one_tiny_block(config).model_copy(update={**change, "initializer_range": (16 * heads) ** -0.5})


def _with_other_theta(model: CausalLM, ids: Int[Tensor, "1 T"]) -> Float[Tensor, "1 last V"]:
    theta = 10_000.0 if model.config.rope_theta != 1e4 else 500.0
    other = CausalLM(model.config.model_copy(update={"rope_theta": theta}))
    other.load_state_dict(model.state_dict())
    return _last(other.to(model.lm_head.weight.dtype)(ids))


def _late_ids(model: CausalLM, length: int) -> Int[Tensor, "1 T"]:
    return ids_for(model.config.vocab_size, 1, length, seed=6)


def _last(logits: Float[Tensor, "1 T V"]) -> Float[Tensor, "1 last V"]:
    return logits[:, -LATE_POSITIONS:]
