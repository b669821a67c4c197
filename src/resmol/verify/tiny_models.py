"""Small models of many shapes: a mistake that one shape hides shows in another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resmol.checks import Check
from resmol.config.model_config import ModelConfig
from resmol.model.flops import total_parameters
from resmol.model.llama import Attention, CausalLM
from resmol.verify.parity import Precision, errors, ids_for, parity, rms, tolerance
from resmol.verify.reference import exact_model, reference_model

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "bfloat16 autocast")
LATE_LENGTH = 8192
LATE_POSITIONS = 64
# Above this, random models are compared at reduced depth.
FULL_DEPTH_PARAMETERS = 200_000_000


class Twin(NamedTuple):
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


STANDARD: tuple[Twin, ...] = (
    Twin(4, 4, 8, 2, 48, 211, True, 10_000.0, 1e-5),
    Twin(3, 1, 16, 2, 64, 128, True, 100_000.0, 1e-5, "eager"),
    Twin(9, 3, 8, 3, 96, 211, True, 100_000.0, 1e-5),
    Twin(9, 1, 6, 2, 50, 97, False, 130_000.0, 1e-6, "eager"),
    Twin(6, 2, 10, 1, 37, 211, False, 500.0, 1e-2),
)
# Every way of sharing 12 heads, each with the other settings changed as well.
FULL: tuple[Twin, ...] = STANDARD + tuple(
    Twin(12, shared, 2 * index + 2, index, 31 * index, 101 + index, index % 2 == 0, 10.0 ** (index + 1), 10.0**-index)
    for index, shared in enumerate((12, 6, 4, 3, 2, 1), start=1)
)


def fill(model: CausalLM, seed: int) -> CausalLM:
    """Draw weights, norms included: norms of 1 would hide one that is applied twice, or not at all."""
    model.init_weights(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()))
    return model


def twin_parity(config: ModelConfig, twins: tuple[Twin, ...] = STANDARD) -> list[Check]:
    """Compare twins in every precision, and the last positions of the longest context; failures are listed singly."""
    checks: list[Check] = []
    for precision in PRECISIONS:
        results = {f"{twin}: {check.name}": check for twin in twins for check in _one_twin(twin, precision)}
        failed = {name: check for name, check in results.items() if not check.passed}
        measured = f"{len(results) - len(failed)} of {len(results)} comparisons on {len(twins)} shapes hold"
        checks.append(Check(f"twins, {precision}", not failed, measured, "all of them", _GUARDS[precision]))
        checks += [_named(f"{precision}, {name}", check) for name, check in failed.items()]
    return [*checks, late_positions(config, "float32"), late_positions(config, "bfloat16")]


_GUARDS = {
    "float32": "Key/value heads repeated along the wrong axis, a size that is right by accident, an epsilon or theta "
    "that is written into the code: things that one shape hides.",
    "bfloat16": "Norms or softmax that lose their float32: parity in float32 cannot see it.",
    "bfloat16 autocast": "A type that autocast changes behind one's back: this is how training runs in bfloat16.",
}


def _one_twin(twin: Twin, precision: Precision) -> list[Check]:
    model = fill(CausalLM(twin.config, attention=twin.attention), seed=twin.heads)
    return parity(model.bfloat16() if precision == "bfloat16" else model, precision)


def _named(name: str, check: Check) -> Check:
    return Check(name, check.passed, check.measured, check.expected, check.guards)


def late_positions(config: ModelConfig, precision: Precision) -> Check:
    """Compare the last positions of the longest context, on one narrow block with this theta."""
    twin = fill(CausalLM(narrow(config)), seed=5)
    twin = twin.bfloat16() if precision == "bfloat16" else twin
    return compare_late(twin, twin, min(config.max_position_embeddings, LATE_LENGTH), precision)


@torch.no_grad()
def compare_late(
    run: Callable[[Int[Tensor, "1 T"]], Float[Tensor, "1 T V"]], twin: CausalLM, length: int, precision: Precision
) -> Check:
    """Compare the logits at the end of a long sequence.

    Args:
        run: What is checked; it has the weights of ``twin``.
        twin: Our model, which also tells what another theta would give.
        length: T.
        precision: What both compute in.
    """
    ids = ids_for(twin.config.vocab_size, 1, length, seed=6)
    exact = {"logits": _last(exact_model(twin.config, twin.state_dict())(ids).logits)}
    theirs = {"logits": _last(reference_model(twin.config, twin.state_dict())(ids).logits)}
    allowed = tolerance(errors(theirs, exact)["logits"], rms(exact["logits"]), precision)
    first = max(0, length - LATE_POSITIONS)
    # The same weights with another theta must be told apart by this very comparison.
    mine, wrong = (errors({"logits": logits}, exact)["logits"] for logits in (_last(run(ids)), _other_theta(twin, ids)))
    return Check(
        f"late positions, {precision}",
        mine <= allowed < wrong,
        f"error {mine:.1e}; with another theta it would be {wrong:.1e}",
        f"at most {allowed:.1e} (from the reference's own) at positions {first} to {length - 1}",
        "Theta left at the library's default of 10000, or positions rounded to bfloat16 (from 256 on, neighbours "
        "become the same position): both look right on short texts.",
    )


def shallow(config: ModelConfig) -> ModelConfig:
    """Return the architecture with as many layers as a quick check can take: more blocks are more of the same."""
    while total_parameters(config) > FULL_DEPTH_PARAMETERS and config.num_hidden_layers > 1:
        config = config.model_copy(update={"num_hidden_layers": config.num_hidden_layers // 2})
    return config


def narrow(config: ModelConfig) -> ModelConfig:
    """Return one small block with the theta, epsilon and context of an architecture."""
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


def small(config: ModelConfig) -> ModelConfig:
    """Return two small blocks with an architecture's ratio of heads, and more than one key/value head."""
    common = math.gcd(config.num_attention_heads, config.num_key_value_heads)
    heads, shared = (2 * count // common for count in (config.num_attention_heads, config.num_key_value_heads))
    change = {"hidden_size": 16 * heads, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": heads}
    change |= {"num_key_value_heads": shared}
    return narrow(config).model_copy(update={**change, "initializer_range": (16 * heads) ** -0.5})


def _other_theta(twin: CausalLM, ids: Int[Tensor, "1 T"]) -> Float[Tensor, "1 last V"]:
    other = CausalLM(
        twin.config.model_copy(update={"rope_theta": 10_000.0 if twin.config.rope_theta != 1e4 else 500.0})
    )
    other.load_state_dict(twin.state_dict())
    return _last(other.to(twin.lm_head.weight.dtype)(ids))


def _last(logits: Float[Tensor, "1 T V"]) -> Float[Tensor, "1 last V"]:
    return logits[:, -LATE_POSITIONS:]
