"""The loss is PyTorch's cross-entropy, summed, whatever the chunks; and so are its gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resmol.model.cross_entropy import IGNORE_INDEX, cross_entropy_sum


def case(
    batch: int = 2, time: int = 7, width: int = 5, vocabulary: int = 11, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(batch, time, width, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(vocabulary, (batch, time), generator=generator)


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


@pytest.mark.parametrize("chunk", [1, 3, 7, 14, 1000])
@pytest.mark.parametrize("ignored", [[], [0], [0, 6, 13], list(range(14))])
def test_equals_pytorch_in_float64(chunk: int, ignored: list[int]) -> None:
    hidden, weight, targets = case()
    targets.view(-1)[ignored] = IGNORE_INDEX
    ours = cross_entropy_sum(hidden, weight, targets, chunk)
    theirs = reference(hidden, weight, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_gradients_by_finite_differences() -> None:
    hidden, weight, targets = case(1, 3, 4, 6)
    targets[0, 1] = IGNORE_INDEX
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy_sum(h, w, targets, 2), (hidden, weight))


def test_the_gradient_of_a_scaled_loss_is_scaled() -> None:
    hidden, weight, targets = case()
    plain = torch.autograd.grad(cross_entropy_sum(hidden, weight, targets, 4), (hidden, weight))
    scaled = torch.autograd.grad(cross_entropy_sum(hidden, weight, targets, 4) * 0.25, (hidden, weight))
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other, one * 0.25)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_what_needs_a_gradient_gets_one(frozen: str) -> None:
    hidden, weight, targets = case()
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    loss = cross_entropy_sum(hidden, weight, targets, 4)
    if frozen != "both":
        loss.backward()
    assert (hidden.grad is None) is (frozen in ("hidden", "both"))
    assert (weight.grad is None) is (frozen in ("weight", "both"))


@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0, 300.0])
def test_large_and_small_logits_in_float32(size: float) -> None:
    """exp underflows for the unlikely tokens at 300; the loss of such a target must still be right."""
    hidden, weight, targets = case(dtype=torch.float32)
    ours = cross_entropy_sum(hidden * size, weight, targets, 5)
    theirs = reference(hidden.double() * size, weight.double(), targets)
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-5)
    assert bool(torch.isfinite(torch.autograd.grad(ours, hidden)[0]).all())


def test_uniform_logits_give_ln_v() -> None:
    loss = cross_entropy_sum(torch.zeros(1, 4, 3), torch.randn(49, 3), torch.zeros(1, 4, dtype=torch.int64), 2)
    assert float(loss.detach()) == pytest.approx(4 * math.log(49), rel=1e-6)


def test_under_autocast_products_are_bfloat16_and_the_sum_is_float32() -> None:
    hidden, weight, targets = case(2, 16, 32, 64, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy_sum(hidden, weight, targets, 8)
    exact = reference(hidden.double(), weight.double(), targets)
    rounded = reference(hidden.bfloat16().double(), weight.bfloat16().double(), targets)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) != pytest.approx(float(exact.detach()), rel=1e-7), (
        "the products were not rounded at all"
    )
    assert float(loss.detach()) == pytest.approx(float(rounded.detach()), rel=2e-3)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert {grad.dtype for grad in grads} == {torch.float32}
    for mine, other in zip(grads, torch.autograd.grad(exact, (hidden, weight)), strict=True):
        assert float((mine - other).norm() / other.norm()) < 0.02


def test_no_chunk_sees_more_logits_than_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from resmol.model import cross_entropy as module

    sizes: list[int] = []
    genuine = module._loss_and_logit_gradient

    def watch(logits: Tensor, *rest: Tensor) -> Tensor:
        sizes.append(len(logits))
        return genuine(logits, *rest)

    monkeypatch.setattr(module, "_loss_and_logit_gradient", watch)
    cross_entropy_sum(*case(), 4)
    assert sizes == [4, 4, 4, 2]
