"""The update: AdamW or Muon on summed gradients, with the division and the clipping folded into it.

Gradients are sums over the tokens of a step. Dividing them by the global token count and clipping them both multiply
by one number, so the fused update gets that number as its scale: neither needs a pass over the gradients, and there is
one division by the count of the whole step, into however many micro-batches and ranks it was split.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import Parameter

from resmol.config.run_config import OptimizerConfig
from resmol.model.llama import CausalLM
from resmol.run.checkpoint import allocate_moments
from resmol.run.tensor_shards import local_of

CHUNK = 1 << 18  # elements of one dot product: 1 MiB in float32
# Muon's update gets the root mean square of AdamW's, so that it takes AdamW's learning rate and weight decay
# (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).
MUON_RATE = "match_rms_adamw"


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon and AdamW, each for its own parameters, as one optimizer with one state.

    Attributes:
        grad_scale: The number that all gradients are divided by in the next step.
        found_inf: Whether the next step updates nothing: 1 or 0.
    """

    grad_scale: Float[Tensor, ""]
    found_inf: Float[Tensor, ""]

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._muon, self._adamw = muon, adamw
        muon.state = adamw.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override] # nobody passes a closure
        """Update all parameters; only AdamW's kernel can scale gradients, and look at `found_inf`, by itself."""
        assert closure is None
        if bool(self.found_inf):
            if not self.state:
                allocate_moments(self, 0)
            return
        for group in self._muon.param_groups:
            torch._foreach_div_([p.grad for p in group["params"]], self.grad_scale)
        # The fused kernel divides by the one and looks at the other.
        self._adamw.grad_scale, self._adamw.found_inf = self.grad_scale, self.found_inf  # type: ignore[attr-defined]
        self._muon.step()
        self._adamw.step()


def build_optimizer(model: CausalLM, config: OptimizerConfig, step_tokens: int) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov & Hutter 2019, algorithm 2), or Muon for the matrices of the blocks beside it.

    The published recipe decays every parameter; ``decay = "matrices"`` leaves the norms' weights out. A group has its
    own ``lr_scale``, by which `apply_update` multiplies the learning rate.

    Args:
        model: Its parameters are updated.
        config: The optimizer and its constants.
        step_tokens: Tokens in a step, over all ranks.
    """
    embedding = model.model.embed_tokens.weight
    matrices = [p for p in model.model.layers.parameters() if p.dim() > 1] if config.name == "muon" else []
    of_muon = {id(p) for p in matrices}
    adamw = torch.optim.AdamW(
        _groups((p for p in model.parameters() if id(p) not in of_muon), embedding, config),
        lr=config.lr,
        betas=(config.beta1, config.beta2_at(step_tokens)),
        eps=config.eps,
        fused=True,
    )
    if not matrices:
        return adamw
    groups = _groups(matrices, embedding, config)
    return MuonWithAdamW(torch.optim.Muon(groups, momentum=config.muon_momentum, adjust_lr_fn=MUON_RATE), adamw)


def _groups(parameters: Iterable[Parameter], embedding: Tensor, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the parameters in groups of the same weight decay and learning rate."""
    groups: dict[tuple[float, float], list[Parameter]] = {}
    for parameter in parameters:
        decays = config.decay == "all" or parameter.dim() > 1
        scale = config.embedding_lr_scale if parameter is embedding else 1.0
        groups.setdefault((config.weight_decay if decays else 0.0, scale), []).append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay, "lr_scale": scale}
        for (weight_decay, scale), members in groups.items()
    ]


def gradient_norm(model: CausalLM, divisor: float) -> Float[Tensor, ""]:
    """Return the L2 norm of the mean gradient: that of the summed gradients, divided by the token count.

    In float16 the gradients have a factor, and ``divisor`` has it as well.

    The squares of each parameter are added up first, then the sums in the model's order: the same additions in the
    same order on any number of ranks. A dot product reads the gradients at the speed of the memory, but the library
    chooses its number of partial sums: over 28 million elements MKL is off by 6e-4 on an AMD processor, and PyTorch's
    own norm by 1e-3. So each dot product is over a chunk. And PyTorch's root is MKL's, which begins at an approximation
    that differs from processor to processor; its reciprocal root does not.

    Of a sharded model each rank adds up the squares of its share, which are then added over the ranks: up to rounding,
    the same norm on each of them.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    squares = _sums_of_squares([local_of(gradient) for gradient in gradients])
    mesh = getattr(gradients[0], "device_mesh", None)
    if mesh is not None:
        dist.all_reduce(squares, group=mesh.get_group("shard"))
    return squares.sum().rsqrt().reciprocal() / divisor


def _sums_of_squares(tensors: list[Tensor]) -> Float[Tensor, " N"]:
    if tensors[0].device.type != "cpu":  # a thousand small kernels would take as long as the host needs to ask for them
        return torch.stack(torch._foreach_norm(tensors)).square()
    return torch.stack([_sum_of_squares(tensor.view(-1)) for tensor in tensors])


def _sum_of_squares(values: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    return torch.stack([torch.dot(chunk, chunk) for chunk in values.split(CHUNK)]).sum()


def apply_update(
    optimizer: torch.optim.Optimizer,
    *,
    lr: float,
    divisor: float,
    norm: Float[Tensor, ""],
    clip_norm: float,
    is_finite: Bool[Tensor, ""],
) -> None:
    """Update the weights with the mean gradient, clipped to ``clip_norm`` (Pascanu et al. 2013); clear the gradients.

    Where the numbers of the step are not finite, nothing is updated; there are moments afterwards all the same.

    Args:
        optimizer: Its parameters hold the summed gradients.
        lr: The learning rate of this step, before the scale of a group.
        divisor: Targets in this step, over all micro-batches and ranks; times the factor of the gradients in float16.
        norm: The norm of the mean gradient.
        clip_norm: The largest norm to allow; 0 allows any.
        is_finite: Whether to update at all; only the device looks at it.
    """
    clip = torch.clamp(clip_norm / (norm + 1e-6), max=1.0) if clip_norm else torch.ones_like(norm)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.grad_scale = divisor / clip  # type: ignore[attr-defined] # the update divides by it
    optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined] # where it is 1, there is no update
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
