"""A plain implementation as students write it, with a switch for each mistake found in other people's code."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """Without a cast to float32, as most students write it."""

    def __init__(self, width: int, eps: float, outside: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.outside = eps, outside

    def forward(self, x: Tensor) -> Tensor:
        if self.outside:
            return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Attention(nn.Module):
    def __init__(self, config: Any, options: Any, index: int) -> None:
        super().__init__()
        self.heads, self.shared = config.num_attention_heads, config.num_key_value_heads
        self.size = config.hidden_size // self.heads
        self.options, self.rotates = options, options.rotation and not (options.skip_fourth and index % 4 == 3)
        for name, count in (("q", self.heads), ("k", self.shared), ("v", self.shared)):
            setattr(self, f"{name}_proj", nn.Linear(config.hidden_size, count * self.size, bias=options.bias))
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        longest = options.longest or config.max_position_embeddings
        theta = options.theta or config.rope_theta
        angles = torch.arange(longest)[:, None] / theta ** (torch.arange(0, self.size, 2) / self.size)
        layout = (
            angles.repeat_interleave(2, -1) if options.interleaved == "consistently" else torch.cat([angles] * 2, -1)
        )
        tables = torch.stack((layout.cos(), layout.sin()))
        self.register_buffer("tables", tables.to(options.tables).float(), persistent=False)

    def _rotate(self, x: Tensor) -> Tensor:
        if not self.rotates:
            return x
        if self.options.over_heads:
            x = x.transpose(1, 2)
        length = x.shape[2]
        if length > self.tables.shape[1]:
            raise IndexError(f"position {length} of {self.tables.shape[1]}")
        cos, sin = self.tables[:, :length]
        if self.options.interleaved:
            other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        else:
            first, second = x.chunk(2, -1)
            other = torch.cat((-second, first), -1)
        x = x * cos + other * sin
        return x.transpose(1, 2) if self.options.over_heads else x

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            part(x).view(batch, length, -1, self.size).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self._rotate(query), self._rotate(key)
        groups = self.heads // self.shared
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        scores = query @ key.mT / (math.sqrt(self.size) if self.options.scale else 1.0)
        if self.options.mask:
            position = torch.arange(length)
            visible = position <= position[:, None]
            if self.options.window:
                visible &= position > position[:, None] - self.options.window
            scores = scores.masked_fill(~visible, -math.inf)
        return self.o_proj((scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (
            nn.Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in range(2)
        )
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Any, options: Any, index: int) -> None:
        super().__init__()
        eps = options.eps or config.rms_norm_eps
        self.self_attn, self.mlp = Attention(config, options, index), FeedForward(config)
        self.input_layernorm, self.post_attention_layernorm = (
            Norm(config.hidden_size, eps, options.outside) for _ in range(2)
        )
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x)))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class PlainModel(nn.Module):
    """The right architecture; options put mistakes in."""

    def __init__(self, config: Any, **chosen: Any) -> None:
        super().__init__()
        options = SimpleNamespace(**{**RIGHT, **chosen})
        self.shift = options.shift
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, options, index) for index in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, options.eps or config.rms_norm_eps, options.outside)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        std = config.initializer_range if options.std is None else options.std
        if std:
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    nn.init.normal_(parameter, std=std)
        if options.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def logits(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(ids)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        length = labels.shape[1] - self.shift
        return F.cross_entropy(logits[:, :length].flatten(0, 1), labels[:, self.shift :].flatten())


RIGHT: dict[str, Any] = {
    "bias": False, "rotation": True, "skip_fourth": False, "longest": None, "theta": None, "interleaved": "",
    "over_heads": False, "tables": torch.float32, "scale": True, "mask": True, "window": None, "eps": None,
    "outside": False, "dropout": 0.0, "std": None, "tied": True, "shift": 1,
}  # fmt: skip


class WithLabels(PlainModel):
    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.logits(ids)
        return logits if labels is None else (self.loss(logits, labels), logits)


class WithTargets(PlainModel):
    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        logits = self.logits(ids)
        return logits, None if targets is None else self.loss(logits, targets)
