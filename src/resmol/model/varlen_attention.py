"""Attention inside documents without a mask: the documents of a batch in one row, by a kernel that knows their borders.

A mask costs T x T truth values for each row of a batch, and the fused kernel that takes one computes what it hides as
well. FlashAttention's kernel for sequences of varying length (Dao et al. 2022; Dao 2023) skips it. PyTorch has that
kernel for half precision on CUDA devices (`torch.nn.attention.varlen`, in newer versions).

Shapes as in `llama`, and: N documents of all rows together.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older PyTorch
    HAS_VARLEN = False
else:
    HAS_VARLEN = "enable_gqa" in inspect.signature(varlen_attn).parameters

SIZES = 8  # the number of offsets is filled up to a power of this: code is compiled for each number anew


class DocumentOffsets(NamedTuple):
    """Where the documents begin when the rows of a batch follow each other; each row begins one.

    Attributes:
        offsets: The first position of each document, in order, and the number of all positions, once or more.
        longest: No document is longer.
    """

    offsets: Int32[Tensor, " N"]
    longest: int


def document_offsets(document_ids: Int[Tensor, "B T"]) -> DocumentOffsets:
    """Return where documents begin.

    Args:
        document_ids: The document of each token, on the CPU: how many there are decides the shape of the result.
    """
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = begins.flatten().nonzero()[:, 0]
    size = SIZES
    while size <= len(starts):
        size *= SIZES
    offsets = F.pad(starts, (0, size - len(starts)), value=document_ids.numel())
    return DocumentOffsets(offsets.to(torch.int32), document_ids.shape[1])


def attend_inside_documents(
    query: Float[Tensor, "B H T Dh"],
    key: Float[Tensor, "B K T Dh"],
    value: Float[Tensor, "B K T Dh"],
    documents: DocumentOffsets,
) -> Float[Tensor, "B H T Dh"]:
    """Return what `llama.attend` returns with the mask of these documents."""
    packed_query, packed_key, packed_value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    offsets, longest = documents
    mixed = varlen_attn(
        packed_query,
        packed_key,
        packed_value,
        offsets,
        offsets,
        longest,
        longest,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(mixed, Tensor)
    return mixed.unflatten(0, (query.shape[0], -1)).transpose(1, 2)
