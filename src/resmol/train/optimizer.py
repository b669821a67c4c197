"""AdamW on summed gradients, with the division and the clipping folded into the update.

Gradients are sums over the tokens of a step. Dividing them by the global token count and clipping them both multiply
by one number, so the fused update gets that number as its scale: neither needs a pass over the gradients, and there is
one division by the count of the whole step, into however many micro-batches and ranks it was split.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from resmol.config.run_config import OptimizerConfig
from resmol.model.llama import CausalLM

CHUNK = 1 << 18  # elements of one dot product: 1 MiB in float32


def build_optimizer(model: CausalLM, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2019, algorithm 2), with the parameters in groups with and without decay.

    The published recipe decays every parameter; ``decay = "matrices"`` leaves the norms' weights out.
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
    same order on any number of ranks. A dot product reads the gradients at the speed of the memory, but the library
    chooses its number of partial sums: over 28 million elements MKL is off by 6e-4 on an AMD processor, and PyTorch's
    own norm by 1e-3. So each dot product is over a chunk.
    """
    flat = [p.grad.view(-1) for p in model.parameters() if p.grad is not None]
    return torch.stack([_sum_of_squares(gradient) for gradient in flat]).sum().sqrt() / tokens


def _sum_of_squares(values: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    return torch.stack([torch.dot(chunk, chunk) for chunk in values.split(CHUNK)]).sum()


def apply_update(
    optimizer: torch.optim.AdamW, *, lr: float, tokens: int, norm: Float[Tensor, ""], clip_norm: float
) -> None:
    """Update the weights with the mean gradient, clipped to ``clip_norm`` (Pascanu et al. 2013); clear the gradients.

    Args:
        optimizer: Its parameters hold the summed gradients.
        lr: The learning rate of this step.
        tokens: Targets in this step, over all micro-batches and ranks.
        norm: The norm of the mean gradient.
        clip_norm: The largest norm to allow; 0 allows any.
    """
    clip = torch.clamp(clip_norm / (norm + 1e-6), max=1.0) if clip_norm else torch.ones_like(norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.grad_scale = tokens / clip  # type: ignore[attr-defined] # the fused kernel divides by it
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
