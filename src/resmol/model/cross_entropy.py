"""Cross-entropy as a sum over tokens, computed in chunks so that the logits never exist whole.

A window of 2048 tokens has 2048 x 49,152 logits: 400 MB in float32, three times over in an ordinary training step.
Here the gradient of a chunk is computed while its logits are still in the processor's cache, and the logits are
dropped. The loss is a *sum*; the caller divides it by the number of tokens of the whole step, over all
micro-batches and ranks, so that no token weighs more because its batch was short.

Shapes as in `llama`, and: N tokens of a chunk, or of all rows together.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resmol.model.linear import MatmulBackend, multiply

IGNORE_INDEX = -100  # a target that does not count, as in PyTorch


def cross_entropy_sum(
    hidden: Float[Tensor, "B T D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "B T"],
    chunk_tokens: int = 256,
    backend: MatmulBackend = "mkl",
) -> Float[Tensor, ""]:
    """Return ``sum(-log softmax(hidden @ weight^T)[target])`` over the tokens whose target is not `IGNORE_INDEX`.

    Args:
        hidden: The input of the output layer.
        weight: The output layer.
        targets: The next token at every position.
        chunk_tokens: Tokens whose logits exist at the same time.
        backend: The library of the matrix products in float32; see `linear`.

    Returns:
        The loss in nats, summed, in float32.
    """
    result = _ChunkedCrossEntropy.apply(hidden.flatten(0, 1), weight, targets.flatten(), chunk_tokens, backend)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in its forward pass: ``dL/dlogits = softmax - onehot`` needs the logits just once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "N D"],
        weight: Float[Tensor, "V D"],
        targets: Int[Tensor, " N"],
        chunk: int,
        backend: MatmulBackend,
    ) -> Float[Tensor, ""]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        compute_dtype = _compute_dtype(hidden)
        inputs, matrix = hidden.to(compute_dtype), weight.to(compute_dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = _SumOfProducts(weight, compute_dtype) if needs_weight else None
        scratch = _Scratch(min(chunk, len(hidden)), weight, compute_dtype, backend)
        total = torch.zeros((), dtype=torch.promote_types(compute_dtype, torch.float32), device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = scratch.product(inputs[rows], matrix)
            counts = targets[rows] != IGNORE_INDEX
            total += _loss_and_logit_gradient(logits, targets[rows], counts)
            delta = scratch.in_compute_dtype(logits)
            if grad_hidden is not None:
                grad_hidden[rows] = _of_counted(counts, multiply(delta, matrix.T, backend))
            if grad_weight is not None:
                grad_weight.add(delta.T, _of_counted(counts, inputs[rows]))
            del logits, delta  # before the next ones exist
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        if scale.device.type != "cpu" or scale.item() != 1.0:  # the usual 1 costs no pass over V x D numbers
            grad_hidden = None if grad_hidden is None else grad_hidden * scale
            grad_weight = None if grad_weight is None else grad_weight * scale
        return grad_hidden, grad_weight, None, None, None


class _Scratch:
    """The logits of a chunk, in memory that all chunks share: fresh memory would cost more than the computation.

    Products in low precision (bfloat16) are converted to float32 for the softmax, and its result back for the next
    products. oneDNN's float32 products allocate their own memory, which the allocator hands out again for each chunk.
    """

    def __init__(
        self, rows: int, weight: Float[Tensor, "V D"], compute_dtype: torch.dtype, backend: MatmulBackend
    ) -> None:
        self._backend = backend
        self._is_owner = backend == "mkl" or compute_dtype != torch.float32
        shape = (rows if self._is_owner else 0, len(weight))
        softmax_dtype = torch.promote_types(compute_dtype, torch.float32)
        self._logits = torch.empty(shape, dtype=softmax_dtype, device=weight.device)
        self._product = (
            self._logits if softmax_dtype == compute_dtype else torch.empty_like(self._logits, dtype=compute_dtype)
        )

    def product(self, x: Float[Tensor, "N D"], matrix: Float[Tensor, "V D"]) -> Float[Tensor, "N V"]:
        """Return the logits of a chunk, in float32 at least."""
        if not self._is_owner:
            return multiply(x, matrix, self._backend)
        logits, product = self._logits[: len(x)], self._product[: len(x)]
        torch.mm(x, matrix.T, out=product)
        return logits if logits.dtype == product.dtype else logits.copy_(product)

    def in_compute_dtype(self, delta: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Return a tensor of a chunk's logits' shape in the type of the products."""
        return delta if delta.dtype == self._product.dtype else self._product[: len(delta)].copy_(delta)


class _SumOfProducts:
    """A sum of ``left @ right`` in the type of the weights; the first product overwrites what is there."""

    def __init__(self, weight: Float[Tensor, "V D"], compute_dtype: torch.dtype) -> None:
        self.total = torch.empty_like(weight)
        self._product = None if weight.dtype == compute_dtype else torch.empty_like(weight, dtype=compute_dtype)
        self._is_empty = True

    def add(self, left: Float[Tensor, "V N"], right: Float[Tensor, "N D"]) -> None:
        """Add a product."""
        if self._product is None:
            self.total.addmm_(left, right, beta=0 if self._is_empty else 1)
        else:
            torch.mm(left, right, out=self._product)
            self.total.copy_(self._product) if self._is_empty else self.total.add_(self._product)
        self._is_empty = False


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the type of the matrix products: autocast's where it is on, else that of the input."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _of_counted(counts: Bool[Tensor, " N"], rows: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """Return the rows with zeros in those that do not count.

    They are D wide, where the gradient of the logits is V wide. A look at whether all count costs less, but on a device
    the host would wait for it.
    """
    if rows.device.type == "cpu" and bool(counts.all()):
        return rows
    return torch.where(counts[:, None], rows, 0.0)


def _loss_and_logit_gradient(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"], counts: Bool[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Return the summed negative log-likelihood, and replace the logits by its gradient with respect to them.

    Rows that do not count are left with a gradient of no meaning (`_of_counted`).

    The softmax kernel reads and writes the logits once, where log-sum-exp would pass over them four times. Its
    largest probability is at least 1/V, so ``max(logits) - log(max(softmax))`` is the log-sum-exp to full precision.
    """
    index = targets.clamp(min=0)[:, None]
    largest, wanted = logits.amax(dim=-1), logits.gather(1, index)[:, 0]
    delta = torch.softmax(logits, dim=-1, out=logits)
    losses = largest - delta.amax(dim=-1).log() - wanted
    delta.scatter_add_(1, index, torch.full_like(index, -1, dtype=delta.dtype))
    return (losses * counts).sum()
