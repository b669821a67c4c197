"""Attention inside documents by their borders equals attention with a mask, in values and gradients.

The kernel is there for CUDA devices only. Here PyTorch's operator, with its own autograd and shapes, gets an
implementation for the CPU: the formula, over each document by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TrainTiny
from torch import Tensor

from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.errors import ConfigError
from resmol.model.llama import CausalLM
from resmol.model.varlen_attention import document_offsets
from resmol.train import devices
from resmol.train.build import make_loader
from resmol.train.gradients import accumulate_gradients
from resmol.train.parallel import Runtime

varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this PyTorch has none")
IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 2]])


def each_by_itself(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, grad: Tensor) -> list[Tensor]:
    """Attend inside each document by the formula; return the result and the gradients of query, key and value.

    The borders are those in the offsets; what they enclose twice is empty.
    """
    found: list[list[Tensor]] = [[], [], [], []]
    heads, shared, scale = query.shape[1], key.shape[1], query.shape[2] ** -0.5
    for start, stop in pairwise(offsets.tolist()):
        q, k, v, upstream = (tensor[start:stop] for tensor in (query, key, value, grad))
        k, v = (tensor.repeat_interleave(heads // shared, 1) for tensor in (k, v))
        future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        weights = (torch.einsum("nhd,mhd->hnm", q, k) * scale).masked_fill(future, -torch.inf).softmax(-1)
        grad_weights = torch.einsum("nhd,mhd->hnm", upstream, v)
        grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * scale
        pairs = ((grad_scores, q), (weights, upstream))
        found[0].append(torch.einsum("hnm,mhd->nhd", weights, v))
        found[1].append(torch.einsum("hnm,mhd->nhd", grad_scores, k))
        for place, (left, right) in zip((2, 3), pairs, strict=True):
            found[place].append(torch.einsum("hnm,nhd->mhd", left, right).unflatten(1, (shared, -1)).sum(2))
    return [torch.cat(parts) for parts in found]


@pytest.fixture(scope="module", autouse=True)
def kernel() -> None:
    """Give PyTorch's operators for sequences of varying length an implementation for the CPU."""

    def forward(
        query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, offsets_k: Tensor, longest: int, longest_k: int,
        is_causal: bool = False, *_: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        assert is_causal
        assert longest == longest_k >= int(offsets.diff().max())
        assert torch.equal(offsets, offsets_k)
        assert offsets.dtype == torch.int32
        mixed = each_by_itself(query, key, value, offsets, torch.zeros_like(query))[0]
        return (
            mixed,
            query.new_zeros((query.shape[1], len(query)), dtype=torch.float32),
            torch.zeros(2).to(torch.uint64),
        )

    def backward(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, _out: Tensor, _lse: Tensor, offsets: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, one, two, three = each_by_itself(query, key, value, offsets, grad)
        return one, two, three

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)


def test_offsets_are_the_beginnings_of_documents_and_rows() -> None:
    offsets, longest = document_offsets(IDS)
    assert offsets.tolist() == [0, 3, 5, 8, 16, 17, 23, 24]
    assert longest == 8
    assert len(document_offsets(torch.arange(8)[None])[0]) == 64  # eight documents, and the end


def test_equals_attention_with_a_mask(tiny_config: RunConfig) -> None:
    model = CausalLM(tiny_config.model)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(0, model.config.vocab_size, (2, *IDS.shape), generator=generator)
    losses, gradients = [], []
    for documents in (IDS, document_offsets(IDS)):
        model.zero_grad(set_to_none=True)
        loss = model.loss(ids, targets, documents)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_training_gives_the_kernel_the_borders(
    tiny_config: RunConfig, tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of a step by the borders is that by the mask, and no mask was made."""
    gradients: list[list[Tensor]] = []
    for attention in ("sdpa", "varlen"):
        config = with_overrides(tiny_config, [f"runtime.attention={attention}"])
        batch = make_loader(config, tiny_dataset.train).step_after(0)
        assert any(one.document_ids is not None for one in batch.batches)
        model = CausalLM(config.model, attention=attention)  # type: ignore[arg-type]
        model.init_weights(0)
        accumulate_gradients(model, batch.batches, config, Runtime.single())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        monkeypatch.setattr("resmol.model.llama.document_mask", lambda _ids: pytest.fail("a mask was made"))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _patch: None, "for cuda, and the device is cpu"),
        (lambda patch: patch.setattr(devices, "VARLEN", ("cpu",)), "runtime.precision is float32"),
        (lambda patch: patch.setattr(devices, "HAS_VARLEN", False), "has no such attention"),
    ],
)
def test_where_there_is_no_kernel_it_is_refused(
    change: Callable[[Any], None], said: str, tmp_path: Path, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    with pytest.raises(ConfigError, match=said) as error:
        train_tiny(tmp_path / "run", 1, "runtime.attention=varlen", "runtime.precision=float32")
    assert "runtime.attention=sdpa" in error.value.fix
