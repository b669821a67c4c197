"""Rows 1, 2, 5, 14 to 17: mistakes in the model, noticed by `resmol verify`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from bench import Bench, Mistake, mistake, replaced
from torch import Tensor, nn

from resmol.config.load import load_preset
from resmol.config.model_config import ModelConfig
from resmol.model import llama as module
from resmol.model.flops import total_parameters
from resmol.model.llama import CausalLM
from resmol.verify import verify

GENUINE_ROTATE, GENUINE_TABLES, GENUINE_ATTEND = module.rotate, module.rotation_tables, module.attend
GENUINE_NORM = module.RMSNorm.forward


def verify_guard(bench: Bench) -> set[str]:
    """Return the failed checks of `verify`: 3:1 heads, tied, a context beyond 2048."""
    config = bench.config.model.model_copy(update={"max_position_embeddings": 4096, "initializer_range": 24**-0.5})
    return {check.name for check in verify(config) if not check.passed}


def interleaved(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (table.to(x.dtype) for table in rotation)
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin


def over_heads(x: Tensor, _rotation: tuple[Tensor, Tensor]) -> Tensor:
    """As after a transpose too many: the head's number is taken for the position."""
    angles = GENUINE_TABLES(torch.arange(x.shape[1]), x.shape[-1], 100_000.0)
    return GENUINE_ROTATE(x.transpose(1, 2), angles).transpose(1, 2)


def half_of_the_head(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    width = x.shape[-1] // 2
    turned = GENUINE_ROTATE(x, rotation)
    return torch.cat((turned[..., :width], x[..., width:]), dim=-1)


def never(x: Tensor, _rotation: tuple[Tensor, Tensor]) -> Tensor:
    return x


def theta_by_default(positions: Tensor, head_dim: int, _theta: float) -> tuple[Tensor, Tensor]:
    return GENUINE_TABLES(positions, head_dim, 10_000.0)


def bfloat16_positions(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    return GENUINE_TABLES(positions.bfloat16().to(positions.dtype), head_dim, theta)


def no_mask(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, _kind: str) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def inverted_documents(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    if mask is None or mask.shape[-2] != mask.shape[-1]:
        return GENUINE_ATTEND(query, key, value, mask, kind)
    return GENUINE_ATTEND(query, key, value, ~mask | torch.eye(mask.shape[-1], dtype=torch.bool), kind)


def scaled_twice(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    return GENUINE_ATTEND(query / math.sqrt(query.shape[-1]), key, value, mask, kind)


def repeated_along_the_wrong_axis(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    """Heads a b c a b c instead of a a b b c c."""
    groups = query.shape[1] // key.shape[1]
    return GENUINE_ATTEND(query, key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1), mask, kind)


def epsilon_outside(self: Any, x: Tensor) -> Tensor:
    in_float32 = x.float()
    return self.weight * (in_float32 / (in_float32.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)).to(x.dtype)


def norm_in_half_precision(self: Any, x: Tensor) -> Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def dropout_in_evaluation(self: Any, x: Tensor) -> Tensor:
    return F.dropout(GENUINE_NORM(self, x), 0.1, training=True)


def drawn_with(std: float) -> Any:
    @torch.no_grad()
    def init_weights(self: CausalLM, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, std, generator=generator)

    return init_weights


def pytorch_default(self: CausalLM, seed: int) -> None:
    """No initialization of one's own: what nn.Linear and nn.Embedding do by themselves."""
    torch.manual_seed(seed)
    for part in self.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.reset_parameters()
    self.model.norm.weight.data.fill_(1.0)
    for layer in self.model.layers:
        layer.input_layernorm.weight.data.fill_(1.0)
        layer.post_attention_layernorm.weight.data.fill_(1.0)


def untied(cls: type[CausalLM], config: ModelConfig, *, attention: str = "sdpa") -> CausalLM:
    with torch.device("meta"):
        model = cls(config, attention=attention)
    model.to_empty(device="cpu")  # and the two names are left with a tensor each
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def tied_gradient(output_share: float) -> Any:
    """Return a tied gradient in which the output layer's part has another weight than 1."""

    def backward(ctx: Any, grad_rows: Tensor, grad_weight: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        return None, (grad_weight * output_share).index_put_((ids,), grad_rows, accumulate=True)

    return staticmethod(backward)


def parameters_guard(_bench: Bench) -> set[str]:
    """Count the parameters of the real size: 134,515,008."""
    with torch.device("meta"):
        model = CausalLM(load_preset("smollm2-135m").model)
    counted = sum(parameter.numel() for parameter in model.parameters())
    return set() if counted == 134_515_008 == total_parameters(model.config) else {f"parameters: {counted}"}


def never_tied(patch: Any) -> None:
    genuine = CausalLM.__init__

    def init(self: CausalLM, config: ModelConfig, **options: Any) -> None:
        genuine(self, config.model_copy(update={"tie_word_embeddings": False}), **options)

    patch.setattr(CausalLM, "__init__", init)


ROTATE, TABLES, ATTEND = "resmol.model.llama.rotate", "resmol.model.llama.rotation_tables", "resmol.model.llama.attend"
NORM, INITIALIZE = "resmol.model.llama.RMSNorm.forward", "resmol.model.llama.CausalLM.init_weights"
TIED_GRADIENT = "resmol.model.llama._TiedEmbedding.backward"
V = verify_guard
MISTAKES: list[Mistake] = [
    mistake(
        1, "RoPE: neighbors turned by the tables of the half-split layout", replaced(ROTATE, interleaved), V,
        "rotation keeps lengths", "rotation is relative", "logits", "gradients", "tiny models, float32",
    ),
    mistake(2, "RoPE: over the heads instead of the positions", replaced(ROTATE, over_heads), V, "logits"),
    mistake(2, "RoPE: on half of the head", replaced(ROTATE, half_of_the_head), V, "logits", "late positions"),
    mistake(2, "RoPE: never applied", replaced(ROTATE, never), V, "logits", "late positions"),
    mistake(2, "RoPE: positions in bfloat16", replaced(TABLES, bfloat16_positions), V, "late positions"),
    mistake(2, "RoPE: theta 10,000 by default", replaced(TABLES, theta_by_default), V, "logits", "late positions"),
    mistake(5, "no causal mask", replaced(ATTEND, no_mask), V, "causality", "logits"),
    mistake(5, "document mask inverted", replaced(ATTEND, inverted_documents), V, "document mask"),
    mistake(14, "untied in training: a copy of the embeddings", replaced("resmol.model.llama.CausalLM.empty",
            classmethod(untied)), V, "tying"),
    mistake(14, "untied in training: 162,826,560 parameters", never_tied, parameters_guard, "parameters: 162826560"),
    mistake(14, "tied gradient: the output layer's part is dropped", replaced(TIED_GRADIENT, tied_gradient(0.0)), V,
            "gradients", "training, mkl", "tiny models, float32"),
    mistake(14, "tied gradient: the output layer's part is doubled", replaced(TIED_GRADIENT, tied_gradient(2.0)), V,
            "gradients", "training, mkl", "tiny models, float32"),
    mistake(15, "initialization: none of one's own", replaced(INITIALIZE, pytorch_default), V, "initial weights"),
    mistake(15, "initialization: 0.02", replaced(INITIALIZE, drawn_with(0.02)), V, "initial weights"),
    mistake(15, "initialization: N(0, 1)", replaced(INITIALIZE, drawn_with(1.0)), V, "initial weights", "first loss"),
    mistake(16, "norm: epsilon outside the root", replaced(NORM, epsilon_outside), V, "tiny models, float32"),
    mistake(16, "norm: not in float32", replaced(NORM, norm_in_half_precision), V, "norm in bfloat16"),
    mistake(16, "attention scaled twice", replaced(ATTEND, scaled_twice), V, "logits"),
    mistake(16, "dropout in evaluation", replaced(NORM, dropout_in_evaluation), V, "training mode", "logits"),
    mistake(17, "repeat_kv along the wrong axis", replaced(ATTEND, repeated_along_the_wrong_axis), V,
            "tiny models, float32"),
]  # fmt: skip
