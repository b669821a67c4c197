"""The known bugs of other implementations, each as one wrong part of the architecture.

`forward` is the architecture once more, plain and slow, with every part exchangeable. It serves the diagnosis only and
shares no code with the model that is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resmol.config.model_config import ModelConfig

Heads = Float[Tensor, "*B T Dh"]
Turn = Callable[[Heads, float], Heads]


# --- the parts as they should be -----------------------------------------------------------------------------


def tables(positions: Float[Tensor, " T"], size: int, theta: float) -> Float[Tensor, "T half"]:
    """Return the angles of ``size / 2`` pairs."""
    return positions[:, None] * (1.0 / theta ** (torch.arange(0, size, 2).float() / size))


def turn_half_split(x: Heads, theta: float) -> Heads:
    """Turn the pairs (i, i + Dh/2)."""
    return _half_split(x, tables(torch.arange(x.shape[2]).float(), x.shape[-1], theta))


def _half_split(x: Heads, angles: Float[Tensor, "... half"]) -> Heads:
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def split_heads(x: Float[Tensor, "B T N_Dh"], heads: int) -> Heads:
    """Return the heads of every position."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Heads) -> Float[Tensor, "B T N_Dh"]:
    """Undo `split_heads`."""
    return x.transpose(1, 2).flatten(2)


def causal(length: int) -> Bool[Tensor, "T T"]:
    """Return the causal mask: True where a position may attend."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize, with epsilon inside the root."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@dataclass(frozen=True)
class Parts:
    """The parts of an implementation; the defaults are right."""

    embed_scale: Callable[[ModelConfig], float] = lambda _config: 1.0
    norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    norm_after: bool = False
    final_norm: bool = True
    split: Callable[[Tensor, int], Tensor] = split_heads
    turn_query: Turn = turn_half_split
    turn_key: Turn = turn_half_split
    turn_value: Turn = lambda x, _theta: x
    theta: float | None = None
    share: Callable[[Tensor, int], Tensor] = lambda x, groups: x.repeat_interleave(groups, dim=1)
    scale: Callable[[ModelConfig], float] = lambda config: config.head_dim**-0.5
    mask: Callable[[int], Tensor] = causal
    softmax_axis: int = -1
    merge: Callable[[Tensor], Tensor] = merge_heads
    gated: Callable[[Tensor, Tensor], Tensor] = lambda gate, up: F.silu(gate) * up
    residual: Callable[[Tensor, Tensor], Tensor] = lambda x, _normed: x
    parallel: bool = False
    output: Callable[[Tensor], Tensor] = lambda logits: logits


@torch.no_grad()
def forward(
    weights: Mapping[str, Tensor], config: ModelConfig, ids: Int[Tensor, "B T"], parts: Parts
) -> Float[Tensor, "B T V"]:
    """Return the logits of an implementation made of these parts."""
    x = weights["model.embed_tokens.weight"][ids] * parts.embed_scale(config)
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        own = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
        x = _block(own, config, x, parts)
    if parts.final_norm:
        x = parts.norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return parts.output(F.linear(x, weights[head]))


def _block(own: Mapping[str, Tensor], config: ModelConfig, x: Tensor, parts: Parts) -> Tensor:
    def norm(name: str, values: Tensor) -> Tensor:
        return parts.norm(values, own[f"{name}.weight"], config.rms_norm_eps)

    if parts.norm_after:
        x = norm("input_layernorm", x + _attention(own, config, x, parts))
        return norm("post_attention_layernorm", x + _feed_forward(own, x, parts))
    start = norm("input_layernorm", x)
    after = parts.residual(x, start) + _attention(own, config, start, parts)
    middle = norm("post_attention_layernorm", x if parts.parallel else after)
    return parts.residual(after, middle) + _feed_forward(own, middle, parts)


def _attention(own: Mapping[str, Tensor], config: ModelConfig, x: Tensor, parts: Parts) -> Tensor:
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    theta = parts.theta or config.rope_theta
    query = parts.turn_query(parts.split(F.linear(x, own["self_attn.q_proj.weight"]), heads), theta)
    key = parts.turn_key(parts.split(F.linear(x, own["self_attn.k_proj.weight"]), shared), theta)
    value = parts.turn_value(parts.split(F.linear(x, own["self_attn.v_proj.weight"]), shared), theta)
    key, value = (parts.share(each, heads // shared) for each in (key, value))
    scores = query @ key.transpose(-1, -2) * parts.scale(config)
    scores = scores.masked_fill(~parts.mask(x.shape[1]), -math.inf)
    mixed = scores.softmax(dim=parts.softmax_axis) @ value
    return F.linear(parts.merge(mixed), own["self_attn.o_proj.weight"])


def _feed_forward(own: Mapping[str, Tensor], x: Tensor, parts: Parts) -> Tensor:
    gate, up = (F.linear(x, own[f"mlp.{name}.weight"]) for name in ("gate_proj", "up_proj"))
    return F.linear(parts.gated(gate, up), own["mlp.down_proj.weight"])


# --- the wrong ones ------------------------------------------------------------------------------------------


def turn_interleaved_with_split_tables(x: Heads, theta: float) -> Heads:
    """Rotate (2i, 2i + 1) with tables laid out as cat(angles, angles): the halves of a pair get different angles."""
    angles = tables(torch.arange(x.shape[2]).float(), x.shape[-1], theta)
    angles = torch.cat((angles, angles), dim=-1)
    swapped = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return x * angles.cos() + swapped * angles.sin()


def turn_interleaved(x: Heads, theta: float) -> Heads:
    """Turn the pairs (2i, 2i + 1): a rotation, but in the layout of other weights."""
    order = torch.arange(x.shape[-1]).unflatten(0, (-1, 2)).T.flatten()
    return turn_half_split(x[..., order], theta)[..., order.argsort()]


def _turn_across_heads(x: Heads, theta: float) -> Heads:
    return turn_half_split(x.transpose(1, 2), theta).transpose(1, 2)


def _turn_half_the_head(x: Heads, theta: float) -> Heads:
    size = x.shape[-1] // 4 * 2
    return torch.cat((turn_half_split(x[..., :size], theta), x[..., size:]), dim=-1)


def _turn_backwards(x: Heads, theta: float) -> Heads:
    return _half_split(x, -tables(torch.arange(x.shape[2]).float(), x.shape[-1], theta))


def _turn_rounded_positions(x: Heads, theta: float) -> Heads:
    positions = torch.arange(x.shape[2]).bfloat16().float()
    return _half_split(x, tables(positions, x.shape[-1], theta))


def _turn_rounded_angles(x: Heads, theta: float) -> Heads:
    angles = tables(torch.arange(x.shape[2]).float(), x.shape[-1], theta)
    return _half_split(x, angles.bfloat16().float())


def _turn_slowly(x: Heads, theta: float) -> Heads:
    return turn_half_split(x, math.sqrt(theta))  # theta^(-i / Dh): the 2 of the exponent forgotten


def _turn_whole_width(x: Heads, theta: float) -> Heads:
    angles = tables(torch.arange(x.shape[2]).float(), x.shape[1] * x.shape[-1], theta)
    return split_heads(_half_split(merge_heads(x), angles), x.shape[1])


def _unturned(x: Heads, _theta: float) -> Heads:
    return x


def _both(turn: Turn) -> dict[str, Any]:
    return {"turn_query": turn, "turn_key": turn}


def _outside(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps) * weight


def _layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, None, eps)


def _one_ahead(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril(1)


@dataclass(frozen=True)
class KnownBug:
    """A bug that is known from other implementations.

    Attributes:
        what: The bug in words.
        change: The parts it replaces.
    """

    what: str
    change: Mapping[str, Any] = field(default_factory=dict)

    def applied_to(self, parts: Parts) -> Parts:
        """Return the parts with this bug."""
        return replace(parts, **self.change)


KNOWN_BUGS: tuple[KnownBug, ...] = (
    KnownBug(
        "positions are not rotated: interleaved pairs are combined with tables for half-split pairs",
        _both(turn_interleaved_with_split_tables),
    ),
    KnownBug("rotary pairs are (2i, 2i + 1); these weights want (i, i + Dh/2)", _both(turn_interleaved)),
    KnownBug("positions are never applied", _both(_unturned)),
    KnownBug("the rotation runs over the heads instead of the positions", _both(_turn_across_heads)),
    KnownBug("only half of each head is rotated", _both(_turn_half_the_head)),
    KnownBug("the rotation turns the other way", _both(_turn_backwards)),
    KnownBug("positions are rounded to bfloat16: from 256 on, neighbors become one", _both(_turn_rounded_positions)),
    KnownBug("rotation angles are rounded to bfloat16", _both(_turn_rounded_angles)),
    KnownBug("the exponent of the rotation is -i/Dh instead of -2i/Dh", _both(_turn_slowly)),
    KnownBug("the rotation runs over the whole width, before it is split into heads", _both(_turn_whole_width)),
    KnownBug("queries are rotated, keys are not", {"turn_key": _unturned}),
    KnownBug("values are rotated too", {"turn_value": turn_half_split}),
    KnownBug("theta is 10000, the library's default", {"theta": 10_000.0}),
    KnownBug("theta is 500000, that of Llama 3", {"theta": 500_000.0}),
    KnownBug(
        "key/value heads are repeated along the wrong axis", {"share": lambda x, groups: x.repeat(1, groups, 1, 1)}
    ),
    KnownBug("attention is scaled twice", {"scale": lambda config: 1.0 / config.head_dim}),
    KnownBug("attention is not scaled", {"scale": lambda _config: 1.0}),
    KnownBug("attention is scaled by the whole width", {"scale": lambda config: config.hidden_size**-0.5}),
    KnownBug("there is no causal mask", {"mask": lambda length: torch.ones(length, length, dtype=torch.bool)}),
    KnownBug("the causal mask is one too wide: a position sees the token that it must predict", {"mask": _one_ahead}),
    KnownBug("the causal mask is inverted", {"mask": lambda length: causal(length).T}),
    KnownBug("softmax runs over the queries instead of the keys", {"softmax_axis": -2}),
    KnownBug(
        "heads are split by a reshape without a transpose",
        {"split": lambda x, heads: x.reshape(x.shape[0], heads, x.shape[1], -1)},
    ),
    KnownBug(
        "heads are merged by a reshape without a transpose",
        {"merge": lambda x: x.reshape(x.shape[0], x.shape[2], -1)},
    ),
    KnownBug("the norm's epsilon stands outside the root", {"norm": _outside}),
    KnownBug("the norm's epsilon is 1e-6", {"norm": lambda x, weight, _eps: rms_norm(x, weight, 1e-6)}),
    KnownBug("the norm's epsilon is 1e-5", {"norm": lambda x, weight, _eps: rms_norm(x, weight, 1e-5)}),
    KnownBug("norms subtract the mean (LayerNorm)", {"norm": _layer_norm}),
    KnownBug("norms ignore their weight", {"norm": lambda x, weight, eps: rms_norm(x, torch.ones_like(weight), eps)}),
    KnownBug("norms stand after each layer instead of before it", {"norm_after": True}),
    KnownBug("the final norm is missing", {"final_norm": False}),
    KnownBug("gate_proj and up_proj are exchanged", {"gated": lambda gate, up: gate * F.silu(up)}),
    KnownBug("the gate is GELU instead of SiLU", {"gated": lambda gate, up: F.gelu(gate) * up}),
    KnownBug("the gate is a sigmoid instead of SiLU", {"gated": lambda gate, up: gate.sigmoid() * up}),
    KnownBug("the gate is ReLU instead of SiLU", {"gated": lambda gate, up: gate.relu() * up}),
    KnownBug("the residual is taken after the norm", {"residual": lambda _x, normed: normed}),
    KnownBug("there is no residual connection", {"residual": lambda x, _normed: torch.zeros_like(x)}),
    KnownBug("attention and feed-forward run side by side", {"parallel": True}),
    KnownBug("embeddings are multiplied by sqrt(D)", {"embed_scale": lambda config: config.hidden_size**0.5}),
    KnownBug("logits are one position late", {"output": lambda logits: logits.roll(1, dims=1)}),
    KnownBug("logits are one position early", {"output": lambda logits: logits.roll(-1, dims=1)}),
    KnownBug("probabilities are returned instead of logits", {"output": lambda logits: logits.softmax(-1)}),
    KnownBug("log-probabilities are returned instead of logits", {"output": lambda logits: logits.log_softmax(-1)}),
)
