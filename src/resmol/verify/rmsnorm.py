"""The arithmetic inside RMSNorm: its float32 mean and root show in bfloat16 only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from resmol.checks import Check
from resmol.config.model_config import ModelConfig
from resmol.model import llama as architecture
from resmol.verify.parity import rms_errors

ROWS = 256
# With float32 inside, an output is rounded twice. Each further rounding adds its own variance, so three roundings
# have sqrt(3/2) = 1.22 times the error; norms in bfloat16 measured 1.27 to 1.36, norms in float32 1.00.
ALLOWED = 1.1

Norm = Callable[[Float[Tensor, "N D"]], Float[Tensor, "N D"]]


def norm_precision(config: ModelConfig) -> Check:
    """Check our norm in bfloat16, on inputs from tiny ones, where epsilon decides, to large ones."""
    norm = architecture.RMSNorm(config.hidden_size, config.rms_norm_eps)
    with torch.no_grad():
        norm.weight.copy_(norm_weight(config.hidden_size))
    return check_norm(config, norm.bfloat16())


def norm_weight(width: int) -> Float[Tensor, " D"]:
    """Return the weight with which norms are compared."""
    return torch.linspace(0.5, 1.5, width)


@torch.no_grad()
def check_norm(config: ModelConfig, norm: Norm) -> Check:
    """Compare a norm's error against float64 with that of a norm that rounds twice.

    Args:
        config: Gives the width and epsilon.
        norm: Maps bfloat16 to bfloat16, with `norm_weight` as its weight.
    """
    width, eps = config.hidden_size, config.rms_norm_eps
    scales = torch.logspace(-4, 4, ROWS)[:, None]
    x = (torch.randn(ROWS, width, generator=torch.Generator().manual_seed(3)) * scales).bfloat16()
    weight = norm_weight(width).bfloat16()
    right = F.rms_norm(x.double(), (width,), weight.double(), eps)
    twice_rounded = weight * F.rms_norm(x.float(), (width,), None, eps).bfloat16()
    # Rows are scaled to a common size, so that the tiny ones weigh as much as the large ones.
    size = right.pow(2).mean(-1, keepdim=True).sqrt()
    exact = {"norm": right / size}
    error, of_two_roundings = (rms_errors({"norm": y.double() / size}, exact)["norm"] for y in (norm(x), twice_rounded))
    return Check(
        "norm in bfloat16",
        error <= ALLOWED * of_two_roundings,
        f"error {error:.2e}, {error / of_two_roundings:.2f} times that of two roundings",
        f"at most {ALLOWED} times: mean and root in float32, epsilon inside the root",
        "Norms computed in bfloat16, or epsilon outside the root: small errors that grow with every layer. "
        "In float32 the first does not show at all.",
    )
