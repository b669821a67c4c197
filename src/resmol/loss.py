"""Cross-entropy as a sum over tokens, computed in chunks so that the logits never exist whole.

A window of 2048 tokens has 2048 x 49,152 logits: 400 MB in float32, three times over in an ordinary training step.
Here the gradient of a chunk is computed while its logits are still in the processor's cache, and the logits are
dropped. The loss is a *sum*; whoever calls divides by the number of tokens of the whole step, over all
micro-batches and processes, so that no token weighs more because its batch was short.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORE = -100  # the target that does not count, as in PyTorch


def cross_entropy_sum(
    hidden: Float[Tensor, "B T D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "B T"],
    chunk_tokens: int = 256,
) -> Float[Tensor, ""]:
    """Return ``sum(-log softmax(hidden @ weight^T)[target])`` over the tokens whose target is not `IGNORE`.

    Args:
        hidden: What the output layer is applied to.
        weight: The output layer.
        targets: The next token at every position.
        chunk_tokens: How many tokens have their logits in memory at the same time.

    Returns:
        The loss in nats, summed, in float32.
    """
    result = _ChunkedCrossEntropy.apply(hidden.flatten(0, 1), weight, targets.flatten(), chunk_tokens)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients as well: ``dL/dlogits = softmax - onehot`` needs the logits just once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "N D"],
        weight: Float[Tensor, "V D"],
        targets: Int[Tensor, " N"],
        chunk: int,
    ) -> Float[Tensor, ""]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        matrix_type = _matrix_type(hidden)
        weight_cast = weight.to(matrix_type)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            x = hidden[rows].to(matrix_type)
            chunk_loss, delta = _loss_and_logit_gradient(x @ weight_cast.T, targets[rows])
            total += chunk_loss
            delta = delta.to(matrix_type)
            if grad_hidden is not None:
                grad_hidden[rows] = delta @ weight_cast
            if grad_weight is not None:
                _add_product(grad_weight, delta.T, x)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        if scale.device.type != "cpu" or scale.item() != 1.0:  # the usual 1 costs no pass over V x D numbers
            grad_hidden = None if grad_hidden is None else grad_hidden * scale
            grad_weight = None if grad_weight is None else grad_weight * scale
        return grad_hidden, grad_weight, None, None


def _matrix_type(hidden: Tensor) -> torch.dtype:
    """Return the type of the matrix products: autocast's where it is on, else that of the input."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _loss_and_logit_gradient(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "N V"]]:
    """Return the summed negative log-likelihood and its gradient with respect to the logits.

    The softmax kernel reads and writes the logits once, where log-sum-exp would pass over them four times. Its
    largest probability is at least 1/V, so ``max(logits) - log(max(softmax))`` is the log-sum-exp to full precision.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = targets != IGNORE
    index = targets.clamp(min=0)[:, None]
    delta = torch.softmax(logits, dim=-1)
    log_sum_exp = logits.amax(dim=-1) - delta.amax(dim=-1).log()
    losses = log_sum_exp - logits.gather(1, index)[:, 0]
    delta.scatter_add_(1, index, torch.full_like(index, -1, dtype=delta.dtype))
    if not bool(counts.all()):
        delta[~counts] = 0.0
    return (losses * counts).sum(), delta


def _add_product(total: Float[Tensor, "V D"], left: Float[Tensor, "V N"], right: Float[Tensor, "N D"]) -> None:
    """Add ``left @ right`` to ``total``, without a temporary where the types allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
