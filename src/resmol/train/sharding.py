"""Fully sharded data parallelism (ZeRO-3; Rajbhandari et al. 2020) by PyTorch's FSDP2: each rank holds a share.

Weights, gradients and moments are DTensors, sharded on their first axis. Before a block computes, its weights are
gathered, and afterwards they are dropped; its gradients are added up and scattered as soon as they are known.

PyTorch's part of this takes as long to import as half of PyTorch, so that happens where it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from resmol.config.run_config import RunConfig
from resmol.model.llama import CausalLM


def sharded_model(config: RunConfig, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype | None) -> CausalLM:
    """Return this rank's share of a model with its initial weights, which have the bits of one process's.

    No rank ever holds more than its share and one whole block, or the embedding.

    Args:
        config: Of the run.
        mesh: The ranks over which the weights are sharded.
        device: Where this rank computes.
        dtype: Of the matrix products, if it is not that of the weights. A block's weights are then gathered in it:
            half the bytes, and no copy of them is kept for the backward pass, as autocast would.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    with torch.device("meta"):
        model = CausalLM(config.model, attention=config.runtime.attention)
    # The residual stream, the embedding, gradients and their sums stay in float32.
    in_dtype = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer.to_empty(device=device), mesh=mesh, mp_policy=in_dtype)
    model.model.embed_tokens.to_empty(device=device)
    model.model.norm.to_empty(device=device)
    model.lm_head.to_empty(device=device)
    model.tie_weights()
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gradients are sums, not means
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for method in ("loss", "hidden"):  # `forward` is one already
        register_fsdp_forward_method(model, method)
    with torch.no_grad():
        for parameter, weights in model.initial_weights(config.train.seed):
            parameter.copy_(_share(weights.to(device), parameter))
    return model


def _share(whole: Tensor, like: Any) -> Tensor:
    """Return this rank's share of a tensor that it has whole, distributed as a parameter; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
