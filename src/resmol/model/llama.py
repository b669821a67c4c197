"""The whole architecture of SmolLM2 (a Llama decoder), in one file.

Tensor names are Hugging Face's, so a state dict loads into ``LlamaForCausalLM`` and back without a conversion.

Shape legend, used in every annotation:
    B batch · T time (new tokens) · S positions seen so far · D hidden width · H query heads · K key/value heads ·
    Dh head size · F feed-forward width · V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resmol.config.model_config import ModelConfig
from resmol.model.attention_backward import blockwise_attention, use_blockwise_backward
from resmol.model.cross_entropy import cross_entropy_sum
from resmol.model.kv_cache import KVCache, LayerCache, Mask
from resmol.model.linear import Linear
from resmol.model.varlen_attention import DocumentOffsets, attend_inside_documents

Rotation: TypeAlias = tuple[Float[Tensor, "... T Dh"], Float[Tensor, "... T Dh"]]
Attention = Literal["sdpa", "varlen", "eager"]
DocumentIds: TypeAlias = Int[Tensor, "B T"] | DocumentOffsets | None  # which attention stays inside of


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019): ``x / sqrt(mean(x^2) + eps) * weight``.

    The mean is taken in float32 whatever the input, with epsilon inside the root, as the reference does.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Normalize the last axis."""
        x_float32 = x.to(torch.promote_types(x.dtype, torch.float32))
        x_float32 = x_float32 * torch.rsqrt(x_float32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x_float32.to(x.dtype)


def rotation_tables(positions: Int[Tensor, "*B T"], head_dim: int, theta: float) -> Rotation:
    """Return cosine and sine of the rotary angles (Su et al. 2021), always in float32.

    Pair ``i`` of a head turns by ``position x theta^(-2i / Dh)``. The pairs are ``(i, i + Dh/2)``, the "half-split"
    layout of Hugging Face's weights, so the table of the first half is repeated for the second.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "B N T Dh"], rotation: Rotation) -> Float[Tensor, "B N T Dh"]:
    """Turn every pair ``(x[i], x[i + Dh/2])`` by its angle; lengths do not change."""
    cos, sin = (table.to(x.dtype) for table in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend(
    query: Float[Tensor, "B H T Dh"],
    key: Float[Tensor, "B K S Dh"],
    value: Float[Tensor, "B K S Dh"],
    mask: Mask | DocumentOffsets,
    kind: Attention,
) -> Float[Tensor, "B H T Dh"]:
    """Grouped-query attention (Ainslie et al. 2023): query head ``h`` reads key/value head ``h // (H / K)``.

    Scores are scaled once by ``1 / sqrt(Dh)``. Without a mask, attention is causal, and either nothing is cached
    (T = S) or a single new token sees all S positions; `document_mask` and `KVCache.mask` make the others.
    """
    if isinstance(mask, DocumentOffsets):
        return attend_inside_documents(query, key, value, mask)
    if kind != "eager" and use_blockwise_backward(query, key):  # the same values, another backward pass
        return blockwise_attention(query, key, value, mask)
    if kind != "eager" and query.shape[2] == 1 and query.element_size() == 2 and query.device.type == "cpu":
        # For each head this kernel converts the keys to float32, so the heads that share them are rows of one.
        grouped = query.view(*key.shape[:2], -1, query.shape[-1])  # B K H/K Dh
        return F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask).view(query.shape)
    if kind != "eager":
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and query.shape[2] > 1,  # one new token may see everything
            enable_gqa=query.shape[1] != key.shape[1],
        )
    if mask is None:
        new, seen = query.shape[2], key.shape[2]
        mask = torch.ones(new, seen, dtype=torch.bool, device=query.device).tril(seen - new)[None, None]
    grouped = query.unflatten(1, (key.shape[1], -1))  # the heads that share keys side by side: B K H/K T Dh
    scores = (grouped.flatten(2, 3) @ key.transpose(-1, -2)).view(*grouped.shape[:4], key.shape[2])
    scores = (scores / math.sqrt(query.shape[-1])).masked_fill(~mask[:, None], -math.inf)
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1).to(query.dtype)
    return (weights.flatten(2, 3) @ value).view(query.shape)


class SelfAttention(nn.Module):
    """Causal self-attention with rotary positions and shared key/value heads, without biases."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attention = attention
        key_value_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, key_value_width)
        self.v_proj = Linear(config.hidden_size, key_value_width)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotation: Rotation,
        mask: Mask | DocumentOffsets,
        cache: LayerCache | None,
    ) -> Float[Tensor, "B T D"]:
        """Mix information between positions."""
        query, key, value = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            key, value = cache.extend(key, value)
        mixed = attend(query, key, value, mask, self.attention)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Float[Tensor, "B T N_Dh"]) -> Float[Tensor, "B N T Dh"]:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020): ``down(silu(gate(x)) * up(x))``, without biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Transform each position on its own."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A transformer block with the norms in front (pre-norm), so the residual stream itself is never normalized."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, attention)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotation: Rotation,
        mask: Mask | DocumentOffsets = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Add attention, then the feed-forward layer, to the residual stream."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and the final norm: everything below the output layer."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, attention) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.activation_checkpointing = False  # keep only each block's input for the backward pass (Chen et al. 2016)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        document_ids: DocumentIds = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the normalized hidden states."""
        return self.transform(self.embed_tokens(input_ids), document_ids, cache)

    def transform(
        self,
        x: Float[Tensor, "B T D"],
        document_ids: DocumentIds = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the normalized hidden states of tokens that are embedded already."""
        length = x.shape[1]
        if cache is None:
            positions = torch.arange(length, device=x.device)
            mask = document_mask(document_ids) if isinstance(document_ids, Tensor) else document_ids
        else:
            assert document_ids is None, "a cache holds one document for each row"
            positions, mask = cache.positions(length), cache.mask(length)
        rotation = rotation_tables(positions, self.config.head_dim, self.config.rope_theta)
        for index, layer in enumerate(self.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotation, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rotation, mask, None if cache is None else cache.layers[index])
        return self.norm(x)


def document_mask(document_ids: Int[Tensor, "B T"]) -> Mask:
    """Return which positions may be attended to: the earlier ones of the same document, and the token's own."""
    same_document = document_ids[:, :, None] == document_ids[:, None, :]
    return same_document.tril()[:, None]


class _TiedEmbedding(torch.autograd.Function):
    """Rows of the matrix, and the matrix itself for the output layer: both uses share one gradient.

    The output layer's gradient is dense. The gradient of the embedded tokens is added to a few of its rows, where
    autograd would fill a second matrix of V x D zeros and add the two. PyTorch's kernel chooses the order in which
    equal rows are added; training asks for the deterministic one (`devices.deterministic_kernels`).
    """

    @staticmethod
    def forward(
        ctx: Any, input_ids: Int[Tensor, "B T"], weight: Float[Tensor, "V D"]
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "V D"]]:
        ctx.save_for_backward(input_ids)
        return F.embedding(input_ids, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, Tensor]:
        grad_rows, grad_weight = grad_outputs
        (input_ids,) = ctx.saved_tensors
        return None, grad_weight.index_put_((input_ids,), grad_rows.to(grad_weight.dtype), accumulate=True)


class CausalLM(nn.Module):
    """SmolLM2: a decoder and an output layer that is, when tied, the embedding matrix itself."""

    def __init__(self, config: ModelConfig, *, attention: Attention = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, attention)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.tie_weights()

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        document_ids: DocumentIds = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Return the logits of the next token at every position; `loss` never holds them all."""
        return self.lm_head(self.hidden(input_ids, document_ids, cache))

    def hidden(
        self,
        input_ids: Int[Tensor, "B T"],
        document_ids: DocumentIds = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return the input of the output layer."""
        return self.model(input_ids, document_ids, cache)

    def loss(
        self,
        input_ids: Int[Tensor, "B T"],
        targets: Int[Tensor, "B T"],
        document_ids: DocumentIds = None,
        chunk_tokens: int = 256,
    ) -> Float[Tensor, ""]:
        """Return the cross-entropy in nats, summed over the tokens, in float32.

        This is the only way to the loss: training, evaluation and `resmol verify` all come through here.

        Args:
            input_ids: The tokens.
            targets: The next token at every position; `cross_entropy.IGNORE_INDEX` where none counts.
            document_ids: The document of each token, or where documents begin, for attention inside documents only.
            chunk_tokens: Tokens whose logits exist at the same time.
        """
        if self.config.tie_word_embeddings:
            embedded, weight = _TiedEmbedding.apply(input_ids, self.lm_head.weight)  # type: ignore[no-untyped-call]
        else:
            embedded, weight = self.model.embed_tokens(input_ids), self.lm_head.weight
        hidden = self.model.transform(embedded, document_ids)
        return cross_entropy_sum(hidden, weight, targets, chunk_tokens, self.lm_head.backend)

    @classmethod
    def empty(cls, config: ModelConfig, *, attention: Attention = "sdpa") -> CausalLM:
        """Return a model with uninitialized weights: no time is spent and no random number drawn on them."""
        with torch.device("meta"):
            model = cls(config, attention=attention)
        model.to_empty(device="cpu")
        model.tie_weights()  # `to_empty` has given the two names a tensor each
        return model

    def tie_weights(self) -> None:
        """Let the output layer have the embedding matrix itself as its weight, where the two are tied."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Set the initial weights (`initial_weights`)."""
        for parameter, weights in self.initial_weights(seed):
            parameter.copy_(weights)

    def initial_weights(self, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Draw the initial weights; the same seed gives the same weights on every device and thread count.

        They come one parameter at a time, whole and on the CPU, so that a rank which holds a share of each never holds
        the whole model.

        ==========================  =====================================================================
        embeddings, projections     N(0, s^2) with s = initializer_range (1/24 for SmolLM2-135M)
        ``o_proj``, ``down_proj``   N(0, (s / sqrt(2 x layers))^2): they add to the residual stream 2 x layers
                                    times, and this keeps its variance from growing with the depth
        norms                       1
        ==========================  =====================================================================
        """
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            weights = torch.empty(parameter.shape)
            if parameter.dim() == 1:
                weights.fill_(1.0)
            else:
                adds_to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                weights.normal_(0.0, residual_std if adds_to_residual else std, generator=generator)
            yield parameter, weights
