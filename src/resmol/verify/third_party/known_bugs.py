"""The known bugs of other implementations, each as a wrong part of the architecture.

Bugs that replace different parts can be combined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resmol.verify.third_party.parts import (
    Angles,
    Heads,
    Parts,
    causal,
    frequencies,
    half_split,
    plain_angles,
    rms_norm,
)


def _interleaved(x: Heads, cos: Angles, sin: Angles) -> Heads:
    """Turn the pairs (2i, 2i + 1): a rotation, but in the layout of other weights."""
    order = torch.arange(x.shape[-1]).unflatten(0, (-1, 2)).T.flatten()
    return half_split(x[..., order], cos, sin)[..., order.argsort()]


def _interleaved_with_split_tables(x: Heads, cos: Angles, sin: Angles) -> Heads:
    """Combine the pairs (2i, 2i + 1) with tables for (i, i + Dh/2): no rotation."""
    swapped = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * torch.cat((cos, cos), dim=-1) + swapped * torch.cat((sin, sin), dim=-1)


def _backwards(x: Heads, cos: Angles, sin: Angles) -> Heads:
    return half_split(x, cos, -sin)


def _bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _float16(x: Tensor) -> Tensor:
    return x.half().float()


def _slow_angles(positions: Tensor, size: int, theta: float) -> Tensor:
    return plain_angles(positions, size, math.sqrt(theta))  # theta^(-i / Dh): the 2 of the exponent forgotten


def _rounded_angles(positions: Tensor, size: int, theta: float) -> Tensor:
    return _bfloat16(plain_angles(positions, size, theta))


def _linear_scaling(factor: float) -> Callable[[Tensor, int, float], Tensor]:
    return lambda positions, size, theta: plain_angles(positions / factor, size, theta)


def _llama3_scaling(factor: float, trained: int = 8192) -> Callable[[Tensor, int, float], Tensor]:
    """Return the frequencies of Llama 3.1: slow pairs turn ``factor`` times slower, with a smooth transition."""

    def angles(positions: Tensor, size: int, theta: float) -> Tensor:
        plain = frequencies(size, theta)
        turns = trained * plain / (2 * math.pi)  # within the context that Llama 3 was trained on first
        smooth = ((turns - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0)
        return positions[:, None] * (smooth * plain + (1 - smooth) * plain / factor)

    return angles


def _outside(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps) * weight


def _layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, None, eps)


def _sum_of_squares(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps) * weight


def _with_epsilon(value: float) -> dict[str, Any]:
    return {"norm": lambda x, weight, _eps: rms_norm(x, weight, value)}


def _head_norm(x: Tensor, eps: float) -> Tensor:
    return rms_norm(x, torch.ones(()), eps)


def _one_ahead(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril(1)


def _soft_cap(cap: float) -> dict[str, Any]:
    return {"output": lambda logits: cap * (logits / cap).tanh()}


@dataclass(frozen=True)
class KnownBug:
    """A bug that is known from other implementations.

    Attributes:
        what: The bug in words.
        fix: What to change.
        change: The parts it replaces.
    """

    what: str
    fix: str
    change: Mapping[str, Any] = field(default_factory=dict)

    def applied_to(self, parts: Parts) -> Parts:
        """Return the parts with this bug."""
        return replace(parts, **self.change)


_HALF_SPLIT = "rotate (x[i], x[i + Dh/2]): cat((-second half, first half)) with tables cat((angles, angles))"
_ROTATE_ALL = "rotate query and key, along the whole head, in every block"
_PLAIN_ANGLES = "use position x theta^(-2i/Dh), in float32, without scaling"
_THETA = "read rope_theta from config.json (100000 for SmolLM2-135M)"
_EPSILON = "read rms_norm_eps from config.json (1e-5 for SmolLM2-135M)"
_NORM = "use x * rsqrt(mean(x^2) + eps) * weight"
_SCALE = "divide the scores by sqrt(head_dim), once"
_CAUSAL = "let position t attend to positions 0 to t: a lower triangular mask, diagonal included"
_RESIDUAL = "write x = x + attention(norm(x)), then x = x + mlp(norm(x))"
_GATED = "write down(silu(gate(x)) * up(x))"
_LOGITS = "return the output layer's product as it is, for every position"
_HEADS = "use view(B, T, heads, head_dim).transpose(1, 2), and transpose back before you merge"


def _rotation_bugs() -> list[KnownBug]:
    pairs = {
        "positions are not rotated: interleaved pairs are combined with tables for half-split pairs": (
            _interleaved_with_split_tables
        ),
        "rotary pairs are (2i, 2i + 1); these weights want (i, i + Dh/2)": _interleaved,
        "the rotation turns the other way": _backwards,
    }
    angles = {
        "the exponent of the rotation is -i/Dh instead of -2i/Dh": _slow_angles,
        "rotation angles are rounded to bfloat16": _rounded_angles,
        **{
            f"rotation frequencies are scaled as in Llama 3.1 (factor {factor:g})": _llama3_scaling(factor)
            for factor in (8.0, 32.0)
        },
        **{
            f"positions are divided by {factor:g} (linear scaling of the rotation)": _linear_scaling(factor)
            for factor in (2.0, 4.0, 8.0)
        },
    }
    thetas = {10_000.0: "10000, the library's default", 500_000.0: "500000, that of Llama 3", 1e6: "1000000"}
    return [
        *(KnownBug(what, _HALF_SPLIT, {"pairs": turn}) for what, turn in pairs.items()),
        *(KnownBug(what, _PLAIN_ANGLES, {"angles": turn}) for what, turn in angles.items()),
        *(KnownBug(f"theta is {name}", _THETA, {"theta": theta}) for theta, name in thetas.items()),
        KnownBug("positions are never applied", _ROTATE_ALL, {"rotated": ()}),
        KnownBug("queries are rotated, keys are not", _ROTATE_ALL, {"rotated": ("query",)}),
        KnownBug("values are rotated too", _ROTATE_ALL, {"rotated": ("query", "key", "value")}),
        KnownBug("every fourth block is not rotated, as in SmolLM3", _ROTATE_ALL,
                 {"rotated_layers": lambda index: index % 4 != 3}),
        KnownBug("the rotation runs over the heads instead of the positions",
                 "rotate [B, heads, T, Dh] with tables [T, Dh], after the heads are transposed", {"over_heads": True}),
        KnownBug("only half of each head is rotated", _ROTATE_ALL, {"rotated_width": "half a head"}),
        KnownBug("the rotation runs over the whole width, before it is split into heads",
                 "split into heads first, then rotate each one", {"rotated_width": "all heads"}),
        KnownBug("positions are rounded to bfloat16: from 256 on, neighbors become one",
                 "keep positions and angles in float32", {"positions": _bfloat16}),
        KnownBug("positions are rounded to float16: from 2048 on, neighbors become one",
                 "keep positions and angles in float32", {"positions": _float16}),
        KnownBug("the tables of cosines and sines are rounded to bfloat16",
                 "keep the tables in float32, also when the module is built in bfloat16", {"rounded_table": _bfloat16}),
        KnownBug("the tables of cosines and sines are rounded to float16",
                 "keep the tables in float32, also when the module is built in float16", {"rounded_table": _float16}),
    ]  # fmt: skip


def _attention_bugs() -> list[KnownBug]:
    return [
        KnownBug("queries and keys are normalized in each head, as in Qwen3", "leave out the norms of q and k",
                 {"head_norm": _head_norm}),
        KnownBug("key/value heads are repeated along the wrong axis",
                 "repeat each key/value head for neighboring query heads: repeat_interleave, not repeat",
                 {"share": lambda x, groups: x.repeat(1, groups, 1, 1)}),
        KnownBug("attention is scaled twice", _SCALE, {"scale": lambda config: 1.0 / config.head_dim}),
        KnownBug("attention is not scaled", _SCALE, {"scale": lambda _config: 1.0}),
        KnownBug("attention is scaled by the whole width", _SCALE, {"scale": lambda config: config.hidden_size**-0.5}),
        KnownBug("there is no causal mask", _CAUSAL, {"mask": lambda length: torch.ones(length, length).bool()}),
        KnownBug("the causal mask is one too wide: a position sees the token that it must predict", _CAUSAL,
                 {"mask": _one_ahead}),
        KnownBug("the causal mask is inverted", _CAUSAL, {"mask": lambda length: causal(length).T}),
        KnownBug("softmax runs over the queries instead of the keys", "use softmax(dim=-1)", {"softmax_axis": -2}),
        KnownBug("heads are split by a reshape without a transpose", _HEADS,
                 {"split": lambda x, heads: x.reshape(x.shape[0], heads, x.shape[1], -1)}),
        KnownBug("heads are merged by a reshape without a transpose", _HEADS,
                 {"merge": lambda x: x.reshape(x.shape[0], x.shape[2], -1)}),
    ]  # fmt: skip


def _other_bugs() -> list[KnownBug]:
    return [
        KnownBug("the norm's epsilon stands outside the root", _NORM, {"norm": _outside}),
        *(KnownBug(f"the norm's epsilon is {eps:g}", _EPSILON, _with_epsilon(eps))
          for eps in (1e-5, 1e-6, 1e-8, 1e-3, 0.0)),
        KnownBug("norms subtract the mean (LayerNorm)", _NORM, {"norm": _layer_norm}),
        KnownBug("norms divide by the sum of squares instead of their mean", _NORM, {"norm": _sum_of_squares}),
        KnownBug("norms multiply by 1 + weight, as in Gemma", _NORM,
                 {"norm": lambda x, weight, eps: rms_norm(x, 1 + weight, eps)}),
        KnownBug("norms ignore their weight", _NORM,
                 {"norm": lambda x, weight, eps: rms_norm(x, torch.ones_like(weight), eps)}),
        KnownBug("norms stand after each layer instead of before it", _RESIDUAL, {"norm_after": True}),
        KnownBug("the final norm is missing", "apply the final norm before the output layer", {"final_norm": False}),
        KnownBug("gate_proj and up_proj are exchanged", _GATED, {"gated": lambda gate, up: gate * F.silu(up)}),
        KnownBug("the gate is GELU instead of SiLU", _GATED, {"gated": lambda gate, up: F.gelu(gate) * up}),
        KnownBug("the gate is the approximate GELU instead of SiLU", _GATED,
                 {"gated": lambda gate, up: F.gelu(gate, approximate="tanh") * up}),
        KnownBug("the gate is a sigmoid instead of SiLU", _GATED, {"gated": lambda gate, up: gate.sigmoid() * up}),
        KnownBug("the gate is ReLU instead of SiLU", _GATED, {"gated": lambda gate, up: gate.relu() * up}),
        KnownBug("there is no gate: the feed-forward layer is down(silu(up(x)))", _GATED,
                 {"gated": lambda _gate, up: F.silu(up)}),
        KnownBug("the residual is taken after the norm", _RESIDUAL, {"residual": lambda _x, normed: normed}),
        KnownBug("there is no residual connection", _RESIDUAL, {"residual": lambda x, _normed: torch.zeros_like(x)}),
        KnownBug("attention and feed-forward run side by side", _RESIDUAL, {"parallel": True}),
        KnownBug("embeddings are multiplied by sqrt(D)", "use the embeddings as they are",
                 {"embed_scale": lambda config: config.hidden_size**0.5}),
        KnownBug("logits are one position late", _LOGITS, {"output": lambda logits: logits.roll(1, dims=1)}),
        KnownBug("logits are one position early", _LOGITS, {"output": lambda logits: logits.roll(-1, dims=1)}),
        KnownBug("probabilities are returned instead of logits", _LOGITS, {"output": lambda x: x.softmax(-1)}),
        KnownBug("log-probabilities are returned instead of logits", _LOGITS, {"output": lambda x: x.log_softmax(-1)}),
        *(KnownBug(f"logits are capped at {cap:g} by a tanh", _LOGITS, _soft_cap(cap)) for cap in (15.0, 30.0)),
    ]  # fmt: skip


KNOWN_BUGS: tuple[KnownBug, ...] = (*_rotation_bugs(), *_attention_bugs(), *_other_bugs())


def bugs_from(position: int) -> list[KnownBug]:
    """Return the bugs that show from a position on, and not before it."""

    def window(length: int) -> Tensor:
        return causal(length).triu(1 - position)

    last = position - 1
    return [
        KnownBug(f"attention sees the last {position} tokens only (a sliding window)", _CAUSAL, {"mask": window}),
        KnownBug(f"positions from {position} on are all taken for {last}", "compute the rotation for every position",
                 {"positions": lambda positions: positions.clamp(max=last)}),
        KnownBug(f"positions begin again at {position}", "compute the rotation for every position",
                 {"positions": lambda positions: positions % position}),
    ]  # fmt: skip
