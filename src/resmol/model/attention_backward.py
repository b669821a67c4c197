"""The gradient of fused causal attention on a CPU, in blocks of queries: faster, once compiled, than PyTorch's own.

PyTorch's fused kernel for CPUs has a fast forward pass; its backward pass took an eighth of a training step. Here the
kernel also returns the log-sum-exp of every row of scores, and from that the gradients follow by the formulas of
FlashAttention-2 (Dao 2023, section 3), with matrix products that share their work evenly:

    P = exp(scale x Q K^T - lse)    dV = P^T dO    dS = P * (dO V^T - rowsum(dO * O))
    dQ = scale x dS K               dK = scale x dS^T Q

Shapes as in `llama`, and: G query heads that share a key/value head · N queries of a block · M keys they see.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_QUERIES = 128  # of the T x T scores of a head, only a block's N x M exist at a time
LEAST_QUERIES = 64  # measured from there on
MOST_BLOCKS = 8  # compiled code has each block unrolled; more of them take minutes to compile

Queries: TypeAlias = Float[Tensor, "B H T Dh"]
Keys: TypeAlias = Float[Tensor, "B K T Dh"]
SquareMask: TypeAlias = Bool[Tensor, "#B 1 T T"] | None


def use_blockwise_backward(query: Float[Tensor, "B H T Dh"], key: Float[Tensor, "B K S Dh"]) -> bool:
    """Return whether `blockwise_attention` is faster than PyTorch's own backward pass here.

    Uncompiled it is not, since each operation then reads and writes the scores once more; nor is it for one block in
    float32. In bfloat16 PyTorch's takes a seventh of a step even then.
    """
    least = LEAST_QUERIES if query.dtype == torch.bfloat16 else BLOCK_QUERIES + 1
    return (
        torch.compiler.is_compiling()
        and query.device.type == "cpu"
        and query.requires_grad
        and query.shape[2] == key.shape[2]  # no cached keys
        and least <= query.shape[2] <= BLOCK_QUERIES * MOST_BLOCKS
    )


def blockwise_attention(query: Queries, key: Keys, value: Keys, mask: SquareMask) -> Queries:
    """Return ``softmax(scale x Q K^T) V``, causal, with ``scale = 1 / sqrt(Dh)``.

    Args:
        query: Queries of all heads.
        key: Keys; each is read by G = H / K neighboring query heads.
        value: Values.
        mask: True where a query may attend: its own position, and any of the earlier ones; None for all of them.
    """
    result = _AttentionInBlocks.apply(query, key, value, mask)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


class _AttentionInBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Queries, key: Keys, value: Keys, mask: SquareMask) -> Queries:
        added = None if mask is None else torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
        mixed, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, is_causal=mask is None, attn_mask=added
        )
        assert isinstance(mixed, Tensor)
        ctx.save_for_backward(query, key, value, mask, mixed, log_sum_exp)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Queries, Keys, Keys, None]:
        query, key, value, mask, mixed, log_sum_exp = ctx.saved_tensors
        (grad_mixed,) = grad_outputs
        length, sum_dtype = query.shape[2], log_sum_exp.dtype  # products may be bfloat16, sums are float32 at least
        row_sums = (grad_mixed.to(sum_dtype) * mixed.to(sum_dtype)).sum(dim=-1, keepdim=True)
        of_queries = [
            tensor.unflatten(1, (key.shape[1], -1))  # B K G T *
            for tensor in (query, grad_mixed, log_sum_exp[..., None], row_sums)
        ]
        grad_query = []
        grad_key, grad_value = torch.zeros_like(key, dtype=sum_dtype), torch.zeros_like(value, dtype=sum_dtype)
        for start in range(0, length, BLOCK_QUERIES):
            stop = min(start + BLOCK_QUERIES, length)
            block = [tensor[:, :, :, start:stop] for tensor in of_queries]
            seen = (key[:, :, :stop], value[:, :, :stop], _hidden(mask, start, stop, query.device))
            with torch.autocast(query.device.type, enabled=False):  # compiled, this runs under that of the forward pass
                for_query, for_key, for_value = _gradients_of_block(block, *seen)
            grad_query.append(for_query)
            grad_key[:, :, :stop] += for_key
            grad_value[:, :, :stop] += for_value
        return torch.cat(grad_query, dim=3).flatten(1, 2), grad_key.to(key.dtype), grad_value.to(value.dtype), None


def _hidden(mask: SquareMask, start: int, stop: int, device: torch.device) -> Bool[Tensor, "#B 1 N M"]:
    """Return which of the keys up to the end of a block its queries do not see."""
    if mask is not None:
        return ~mask[:, :, start:stop, :stop]
    return (torch.arange(start, stop, device=device)[:, None] < torch.arange(stop, device=device))[None, None]


def _gradients_of_block(
    of_queries: list[Float[Tensor, "B K G N _"]],
    key: Float[Tensor, "B K M Dh"],
    value: Float[Tensor, "B K M Dh"],
    hidden: Bool[Tensor, "#B 1 N M"],
) -> tuple[Float[Tensor, "B K G N Dh"], Float[Tensor, "B K M Dh"], Float[Tensor, "B K M Dh"]]:
    """Return the gradients of a block's queries, and its contribution to those of the keys and values it sees.

    The G heads that share a key are stacked along the rows, so no key is repeated and the products with P^T and dS^T
    also sum over the heads. ``of_queries`` holds the queries, dO, the log-sum-exp and the row sums of ``dO * O``.
    """
    heads, scale = of_queries[0].shape[2], 1.0 / math.sqrt(key.shape[-1])
    query, grad_mixed, log_sum_exp, row_sums = (tensor.flatten(2, 3) for tensor in of_queries)
    hidden = hidden.repeat(1, 1, heads, 1)
    # What is subtracted from is not rounded to bfloat16: a score of 200 would be off by a half, its weight by 65 %.
    scores = _product(query, key.mT, log_sum_exp.dtype) * scale
    weights = (scores - log_sum_exp).exp().masked_fill(hidden, 0.0)  # a hidden score may exceed lse and overflow
    grad_scores = weights * (_product(grad_mixed, value.mT, log_sum_exp.dtype) - row_sums) * scale
    weights, grad_scores = weights.to(query.dtype), grad_scores.to(query.dtype)
    return (grad_scores @ key).unflatten(2, (heads, -1)), grad_scores.mT @ query, weights.mT @ grad_mixed


def _product(
    left: Float[Tensor, "*B N Dh"], right: Float[Tensor, "*B Dh M"], dtype: torch.dtype
) -> Float[Tensor, "*B N M"]:
    return left.to(dtype) @ right.to(dtype)
