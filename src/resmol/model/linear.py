"""Matrix products with a weight, by the library that is the faster one on this processor.

PyTorch multiplies float32 matrices with the BLAS it was built with, MKL, which is tuned for Intel's processors. It
ships a second library for the same products, oneDNN. On an AMD processor oneDNN computes outputs and gradients of
inputs 1.25 to 1.8 times as fast; on an Intel one MKL wins. Both sum in float32, in a different order, so the last bits
of the results differ: the choice belongs to a run, like its precision.

The choice is for a CPU, for float32 and for single rows in bfloat16. Other products in bfloat16 are always oneDNN's,
and those on a CUDA device are CUDA's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from resmol.system.host import CPU_FACTS, processor_field

MatmulBackend: TypeAlias = Literal["mkl", "onednn"]

PARTS = 8  # of a weight that multiplies a single row: what cores can share


class Linear(nn.Linear):
    """``x W^T`` without a bias, by the library ``backend``; `set_matmul_backend` sets it for a whole model."""

    backend: MatmulBackend = "mkl"

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """Multiply."""
        return multiply(x, self.weight, self.backend)


def set_matmul_backend(model: nn.Module, backend: MatmulBackend) -> None:
    """Set the library of all matrix products with a weight of the model."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.backend = backend


def has_onednn() -> bool:
    """Return whether this PyTorch has oneDNN's product, which is not part of its documented interface."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def default_matmul_backend(cpu_facts: Path = CPU_FACTS) -> MatmulBackend:
    """Return the library that is faster on this processor: oneDNN on AMD's, the BLAS on all others.

    A rule, no measurement: the last bits depend on the library, and the same command must give the same bits on a busy
    machine too.
    """
    is_amd = processor_field("vendor_id", cpu_facts) == "AuthenticAMD"
    return "onednn" if is_amd and has_onednn() else "mkl"


def multiply(x: Float[Tensor, "*B I"], weight: Float[Tensor, "O I"], backend: MatmulBackend) -> Float[Tensor, "*B O"]:
    """Return ``x W^T``; ``backend`` applies to a CPU without autocast: to float32, and to a single row in bfloat16.

    In bfloat16 a row without a gradient is multiplied by MKL's kernel for vectors where that is the backend: it reads
    the weight half as fast again as oneDNN's for matrices does. On an AMD processor it takes twice as long.
    """
    is_low = x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu"
    if backend == "mkl" and is_low and x.numel() == x.shape[-1] and not torch.is_grad_enabled():
        return torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
    if backend == "mkl" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or x.device.type != "cpu":
        return F.linear(x, weight)
    if torch.is_grad_enabled():
        return cast("Tensor", _linear(x, weight))
    flat = _rows(x)
    is_one_row = len(flat) == 1 and len(weight) % PARTS == 0
    return (_one_row(flat[0], weight) if is_one_row else onednn_product(flat, weight)).view(*x.shape[:-1], -1)


def _rows(x: Float[Tensor, "*B I"]) -> Float[Tensor, "N I"]:
    return x.reshape(-1, x.shape[-1])


def _one_row(row: Float[Tensor, " I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, " O"]:
    """Return the product of a single row, as a batch over parts of the weight, so that all cores read it.

    Reading the weight is the limit here. Where MKL is slow it reads with one core only; oneDNN is no faster than this.
    """
    parts = weight.view(PARTS, -1, weight.shape[1])
    return torch.bmm(row.expand(PARTS, 1, -1), parts.mT).flatten()


def onednn_product(x: Float[Tensor, "N I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "N O"]:
    """Return ``x W^T`` by oneDNN, without a gradient."""
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))


# An operator of our own, since oneDNN's has no gradient, and PyTorch's compiler takes it only with constant weights.
@torch.library.custom_op(
    "resmol::linear", mutates_args=(), device_types="cpu", schema="(Tensor x, Tensor weight) -> Tensor"
)
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return onednn_product(_rows(x), weight).view(*x.shape[:-1], -1)


@_linear.register_fake
def _shape_of_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Float[Tensor, "*B O"]) -> tuple[Float[Tensor, "*B I"], Float[Tensor, "O I"]]:
    """Return the gradients of both factors; the weight's by the BLAS, which is as fast for that product."""
    x, weight = ctx.saved_tensors
    return _linear(grad, weight.mT), torch.mm(_rows(grad).mT, _rows(x))


_linear.register_autograd(_gradients, setup_context=_keep_for_backward)
