"""AdamW on summed gradients, with the division and the clipping folded into the update.

Gradients are sums over the tokens of a step. Dividing them by the global token count and clipping them are both
multiplications by one number, so they are handed to the fused update as its scale: no pass over the gradients of
its own, and one division by the count of the whole step however the step was cut up.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from resmol.config.run_config import OptimizerConfig
from resmol.model.llama import CausalLM

NUMBERS_IN_A_PIECE = 1 << 18  # of a sum of squares in float32: 1 MiB


def build_optimizer(model: CausalLM, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2019, algorithm 2) with a decayed and an undecayed group.

    The published recipe decays every parameter; ``decay = "matrices"`` spares the norms.
    """
    parameters = list(model.parameters())
    decayed = [p for p in parameters if config.decay == "all" or p.dim() > 1]
    spared = [p for p in parameters if not (config.decay == "all" or p.dim() > 1)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def gradient_norm(model: CausalLM, tokens: int) -> Float[Tensor, ""]:
    """Return the L2 norm of the mean gradient: that of the summed gradients, divided by the token count.

    The squares of each parameter are added up first, then the sums in the model's order: the same additions in the
    same order on any number of processes. A dot product reads the gradients at the speed of the memory; in how many
    partial sums it adds is up to the library. Over 28 million numbers MKL is off by 6e-4 on an AMD processor, and
    PyTorch's own norm by 1e-3, so each dot product is over a piece.
    """
    flat = [p.grad.view(-1) for p in model.parameters() if p.grad is not None]
    return torch.stack([_sum_of_squares(gradient) for gradient in flat]).sum().sqrt() / tokens


def _sum_of_squares(numbers: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    return torch.stack([torch.dot(piece, piece) for piece in numbers.split(NUMBERS_IN_A_PIECE)]).sum()


def apply_update(
    optimizer: torch.optim.AdamW, *, lr: float, tokens: int, norm: Float[Tensor, ""], clip_norm: float
) -> None:
    """Update the weights with the mean gradient, clipped to ``clip_norm`` (Pascanu et al. 2013), and forget it.

    Args:
        optimizer: Holds the summed gradients.
        lr: The learning rate of this step.
        tokens: Targets in this step, over all micro-batches and processes.
        norm: The norm of the mean gradient.
        clip_norm: The largest norm to allow; 0 allows any.
    """
    clip = torch.clamp(clip_norm / (norm + 1e-6), max=1.0) if clip_norm else torch.ones_like(norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.grad_scale = tokens / clip  # type: ignore[attr-defined] # the fused kernel divides by it
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
