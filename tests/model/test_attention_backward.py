"""Attention in blocks has the value and the gradients of PyTorch's attention, in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from resmol.model.attention_backward import (
    BLOCK_QUERIES,
    LEAST_QUERIES,
    MOST_BLOCKS,
    blockwise_attention,
    use_blockwise_backward,
)

EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
LENGTHS = [1, 100, BLOCK_QUERIES, BLOCK_QUERIES + 1, 300]


def case(
    length: int, heads: int, shared: int, dtype: torch.dtype, batch: int = 2, size: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as the projections leave them: heads behind positions in memory."""
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(batch, length, number, size, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for number in (heads, shared, shared)
    )
    return query, key, value


def documents(length: int, batch: int = 2) -> Tensor:
    """Return a mask whose documents begin elsewhere in each row, also in mid-block."""
    begins = torch.stack([torch.arange(length) % (37 + 54 * row) == 0 for row in range(batch)])
    numbers = begins.long().cumsum(1)
    return ((numbers[:, :, None] == numbers[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


def exact(tensors: tuple[Tensor, ...], mask: Tensor | None, upstream: Tensor) -> list[Tensor]:
    """Return value and gradients by PyTorch's autograd through its own attention, in float64, each key repeated."""
    query, key, value = (tensor.detach().double().requires_grad_() for tensor in tensors)
    groups = query.shape[1] // key.shape[1]
    allowed = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril() if mask is None else mask
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        mixed = F.scaled_dot_product_attention(
            query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), attn_mask=allowed
        )
    return [mixed.detach(), *torch.autograd.grad(mixed, (query, key, value), upstream.double())]


def assert_near(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype, floor: float = 0.0) -> None:
    """Compare in the norm of the whole tensor.

    A gradient passes through a chain of four products. Each rounds its result and its input, which makes eight
    roundings of half an epsilon; rounding a score of size s changes its weight by s times as much, and here s is at
    most about 4. Together 4 + 4 x 4 / 2 = 12 epsilon, were all to point the same way.
    """
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        error = float((mine.double() - other).norm())
        assert error <= 12 * EPSILON[dtype] * max(float(other.norm()), floor)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "shared"), [(9, 3), (4, 4)])
@pytest.mark.parametrize("dtype", list(EPSILON), ids=str)
def test_value_and_gradients(dtype: torch.dtype, heads: int, shared: int, length: int, masked: bool) -> None:
    tensors, mask = case(length, heads, shared, dtype), documents(length) if masked else None
    mixed = blockwise_attention(*tensors, mask)
    upstream = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = [mixed.detach(), *torch.autograd.grad(mixed, tensors, upstream)]
    # at T = 1 the gradients of query and key are a difference that is zero, of numbers as large as the upstream ones
    assert_near(ours, exact(tensors, mask, upstream), dtype, floor=float(upstream.norm()) if length == 1 else 0.0)


@pytest.mark.parametrize("size", [1, 40, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_large_scores_cost_no_precision(size: int, masked: bool) -> None:
    """Scores of hundreds come up at 135M after 500 steps. Rounded to bfloat16, one of 300 would be off by 1.

    PyTorch's own backward pass, which sums scores in float32, is the measure: at most half as much again.
    """
    query, key, value = case(128, 9, 3, torch.bfloat16, size=64)
    query, key = ((tensor.detach() * size**0.5).requires_grad_() for tensor in (query, key))
    mask = documents(128) if masked else None
    upstream = torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    _, *wanted = exact((query, key, value), mask, upstream)
    results = [
        torch.autograd.grad(mixed, (query, key, value), upstream)
        for mixed in (
            blockwise_attention(query, key, value, mask),
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True),
        )
    ]
    ours, theirs = (
        [float((one.double() - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True)]
        for found in results
    )
    assert all(mine < 1.5 * other for mine, other in zip(ours, theirs, strict=True)), (ours, theirs)


def test_one_mask_for_the_whole_batch() -> None:
    tensors, mask = case(140, 4, 2, torch.float32), documents(140, batch=1)
    mixed = blockwise_attention(*tensors, mask)
    upstream = torch.ones_like(mixed)
    ours = [mixed.detach(), *torch.autograd.grad(mixed, tensors, upstream)]
    assert_near(ours, exact(tensors, mask, upstream), torch.float32)


def test_a_hidden_key_with_a_huge_score_leaves_no_trace() -> None:
    """Its weight overflows before it is hidden."""
    query, key, value = case(130, 2, 1, torch.float32)
    with torch.no_grad():
        query[:], key[:, :, -1] = 10.0, 100.0
    mixed = blockwise_attention(query, key, value, None)
    gradients = torch.autograd.grad(mixed[:, :, :-1].sum(), (query, key, value))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert all(not gradient[:, :, -1].any() for gradient in gradients)


def test_computing_it_again_gives_the_same_bits() -> None:
    """As activation checkpointing does, with and without a mask."""
    tensors = case(150, 9, 3, torch.float32)
    for mask in (None, documents(150)):
        kept = blockwise_attention(*tensors, mask)
        again = checkpoint(blockwise_attention, *tensors, mask, use_reentrant=False)
        assert isinstance(again, Tensor)
        gradients = [torch.autograd.grad(mixed.square().sum(), tensors) for mixed in (kept, again)]
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_second_derivative_is_refused() -> None:
    """The formulas take the log-sum-exp for a constant, so differentiating them once more would be wrong."""
    query, key, value = case(5, 2, 1, torch.float64)
    mixed = blockwise_attention(query, key, value, None)
    (gradient,) = torch.autograd.grad(mixed.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_it_is_for_compiled_training_on_a_cpu_with_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, _ = case(BLOCK_QUERIES + 1, 2, 1, torch.float32)
    assert not use_blockwise_backward(query, key)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert use_blockwise_backward(query, key)
    assert not use_blockwise_backward(query.detach(), key)
    assert not use_blockwise_backward(query[:, :, 1:], key[:, :, 1:]), "a single block"
    low = query.detach()[:, :, 1:].bfloat16().requires_grad_()
    assert use_blockwise_backward(low, low), "a single block in bfloat16"
    assert not use_blockwise_backward(low[:, :, : LEAST_QUERIES - 1], low[:, :, : LEAST_QUERIES - 1])
    assert not use_blockwise_backward(query[:, :, :1], key), "one new token, the others from a cache"
    assert not use_blockwise_backward(query.to("meta"), key.to("meta"))
    long = torch.empty(1, 2, BLOCK_QUERIES * MOST_BLOCKS + 1, 4, requires_grad=True)
    assert not use_blockwise_backward(long, long)


COMPILED = """
import sys
import torch
from resmol.model import attention_backward as attention
from resmol.config.model_config import ModelConfig
from resmol.model.llama import CausalLM

config = ModelConfig(
    vocab_size=50, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=True,
    initializer_range=0.2, bos_token_id=0, eos_token_id=0,
)
calls = []
genuine = attention._gradients_of_block
attention._gradients_of_block = lambda *given: calls.append(len(given)) or genuine(*given)
ids = torch.randint(50, (2, 140), generator=torch.Generator().manual_seed(1))
apart = (torch.arange(140) >= 60).long().expand(2, 140)
upstream = torch.randn(2, 140, 48, generator=torch.Generator().manual_seed(3))
for bfloat16, documents, recompute in ((False, apart, True), (True, None, False)):
    gradients = []
    for compiled in (False, True):
        torch.compiler.reset()
        calls.clear()
        model = CausalLM(config)
        model.init_weights(2)
        model.model.activation_checkpointing = recompute
        if compiled:
            for layer in model.model.layers:
                layer.compile(dynamic=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            hidden = model.hidden(ids, documents)
        (hidden * upstream).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert bool(calls) is compiled, (compiled, calls)
    errors = [float((one - other).norm() / one.norm()) for one, other in zip(*gradients)]
    print(max(errors), flush=True)

# scores of hundreds, under autocast as in training
torch.compiler.reset()
attention._gradients_of_block = genuine
draw = torch.Generator().manual_seed(4)
tensors = [torch.randn(1, heads, 128, 64, generator=draw).mul(size).bfloat16().requires_grad_()
           for heads, size in ((9, 10), (3, 10), (3, 1))]
upstream, gradients = torch.randn(1, 9, 128, 64, generator=draw).bfloat16(), []
for attend in (attention.blockwise_attention, torch.compile(attention.blockwise_attention, dynamic=False)):
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attend(*tensors, None)
    gradients.append(torch.autograd.grad(mixed, tensors, upstream))
print(max(float((one - other).norm() / one.norm()) for one, other in zip(*gradients)), flush=True)
"""


def test_compiled_blocks_have_the_gradients_of_uncompiled_ones(tmp_path: Path) -> None:
    """In a process of its own: what checks shapes under pytest cannot be compiled.

    In float32, with documents and computed again, and in bfloat16. Two ways of rounding are compared, through two
    blocks: 2 x 2 x 12 epsilons of the kind counted above. The third is attention alone, where scores are hundreds: what
    is computed in float32 must stay so where the compiler lets it run under autocast.
    """
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    single, rounded, large = (float(line) for line in done.stdout.split())
    assert 0 < single <= 48 * EPSILON[torch.float32]
    assert 0 < rounded <= 48 * EPSILON[torch.bfloat16]
    assert large <= EPSILON[torch.bfloat16]
