"""The architecture once more, plain and slow, with every part exchangeable.

It serves the diagnosis of other implementations only, and shares no code with the model that is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resmol.config.model_config import ModelConfig

Heads: TypeAlias = Float[Tensor, "B N T Dh"]
Angles: TypeAlias = Float[Tensor, "T half"]


def frequencies(size: int, theta: float) -> Float[Tensor, " half"]:
    """Return by how much each of ``size / 2`` pairs turns from one position to the next."""
    return 1.0 / theta ** (torch.arange(0, size, 2).float() / size)


def plain_angles(positions: Float[Tensor, " T"], size: int, theta: float) -> Angles:
    """Return the angles of ``size / 2`` pairs."""
    return positions[:, None] * frequencies(size, theta)


def half_split(x: Heads, cos: Angles, sin: Angles) -> Heads:
    """Turn the pairs (i, i + Dh/2)."""
    first, second = x.chunk(2, dim=-1)
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


def same(x: Tensor) -> Tensor:
    """Return the argument."""
    return x


@dataclass(frozen=True)
class Parts:
    """The parts of an implementation; the defaults are right."""

    embed_scale: Callable[[ModelConfig], float] = lambda _config: 1.0
    norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    norm_after: bool = False
    final_norm: bool = True
    split: Callable[[Tensor, int], Tensor] = split_heads
    head_norm: Callable[[Tensor, float], Tensor] = lambda x, _eps: x
    pairs: Callable[[Heads, Angles, Angles], Heads] = half_split
    positions: Callable[[Float[Tensor, " T"]], Float[Tensor, " T"]] = same
    angles: Callable[[Float[Tensor, " T"], int, float], Angles] = plain_angles
    rounded_table: Callable[[Angles], Angles] = same
    over_heads: bool = False
    rotated_width: str = "head"
    rotated: tuple[str, ...] = ("query", "key")
    rotated_layers: Callable[[int], bool] = lambda _index: True
    theta: float | None = None
    share: Callable[[Tensor, int], Tensor] = lambda x, groups: x.repeat_interleave(groups, dim=1)
    scale: Callable[[ModelConfig], float] = lambda config: config.head_dim**-0.5
    mask: Callable[[int], Tensor] = causal
    softmax_axis: int = -1
    merge: Callable[[Tensor], Tensor] = merge_heads
    gated: Callable[[Tensor, Tensor], Tensor] = lambda gate, up: F.silu(gate) * up
    residual: Callable[[Tensor, Tensor], Tensor] = lambda x, _normed: x
    parallel: bool = False
    output: Callable[[Tensor], Tensor] = same


ROTATION = {"pairs", "positions", "angles", "rounded_table", "over_heads", "rotated_width", "rotated", "theta"}


@torch.no_grad()
def forward(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    ids: Int[Tensor, "B T"],
    parts: Parts,
    last_block: int | None = None,
) -> Float[Tensor, "B T _"]:
    """Return the logits of an implementation made of these parts, or the output of one of its blocks."""
    x = weights["model.embed_tokens.weight"][ids] * parts.embed_scale(config)
    for index in range(config.num_hidden_layers if last_block is None else last_block + 1):
        x = _block(_Block(weights, f"model.layers.{index}.", config, parts, index), x)
    if last_block is not None:
        return x
    if parts.final_norm:
        x = parts.norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return parts.output(F.linear(x, weights[head]))


@dataclass(frozen=True)
class _Block:
    weights: Mapping[str, Tensor]
    prefix: str
    config: ModelConfig
    parts: Parts
    index: int

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{self.prefix}{name}.weight"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self.parts.norm(x, self.weights[f"{self.prefix}{name}.weight"], self.config.rms_norm_eps)


def _block(block: _Block, x: Tensor) -> Tensor:
    parts = block.parts
    if parts.norm_after:
        x = block.norm("input_layernorm", x + _attention(block, x))
        return block.norm("post_attention_layernorm", x + _feed_forward(block, x))
    start = block.norm("input_layernorm", x)
    after = parts.residual(x, start) + _attention(block, start)
    middle = block.norm("post_attention_layernorm", x if parts.parallel else after)
    return parts.residual(after, middle) + _feed_forward(block, middle)


def _attention(block: _Block, x: Tensor) -> Tensor:
    config, parts = block.config, block.parts
    heads, shared = config.num_attention_heads, config.num_key_value_heads

    def projected(name: str, count: int) -> Heads:
        split = parts.split(block.linear(f"self_attn.{name[0]}_proj", x), count)
        split = split if name == "value" else parts.head_norm(split, config.rms_norm_eps)
        turns = name in parts.rotated and parts.rotated_layers(block.index)
        return turned(split, parts.theta or config.rope_theta, parts) if turns else split

    query, key, value = projected("query", heads), projected("key", shared), projected("value", shared)
    key, value = parts.share(key, heads // shared), parts.share(value, heads // shared)
    scores = query @ key.transpose(-1, -2) * parts.scale(config)
    scores = scores.masked_fill(~parts.mask(x.shape[1]), -math.inf)
    mixed = scores.softmax(parts.softmax_axis) @ value
    return block.linear("self_attn.o_proj", parts.merge(mixed))


def turned(x: Heads, theta: float, parts: Parts) -> Heads:
    """Rotate heads in the way of these parts."""
    heads, size = x.shape[1], x.shape[-1]
    if parts.over_heads:
        x = x.transpose(1, 2)
    elif parts.rotated_width == "all heads":
        x, size = merge_heads(x)[:, None], heads * size
    width = size // 4 * 2 if parts.rotated_width == "half a head" else size
    angles = parts.angles(parts.positions(torch.arange(x.shape[2]).float()), width, theta)
    cos, sin = parts.rounded_table(angles.cos()), parts.rounded_table(angles.sin())
    x = torch.cat((parts.pairs(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    if parts.over_heads:
        return x.transpose(1, 2)
    return split_heads(x[:, 0], heads) if parts.rotated_width == "all heads" else x


def _feed_forward(block: _Block, x: Tensor) -> Tensor:
    gate, up = (block.linear(f"mlp.{name}_proj", x) for name in ("gate", "up"))
    return block.linear("mlp.down_proj", block.parts.gated(gate, up))
