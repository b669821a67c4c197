"""transformers' LlamaForCausalLM, the independent reference, and the same in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resmol.config.model_config import ModelConfig
from resmol.errors import DataError


def reference_model(config: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
    """Return transformers' model with these weights, in their type; the memory of the weights is shared.

    Its random initialisation is skipped: every weight comes from ``weights``, or the load is refused.

    Raises:
        DataError: transformers is not installed.
        RuntimeError: Names or shapes differ (``load_state_dict`` with ``strict=True``).
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise DataError(
            f"the reference implementation is missing: {error}",
            fix="install it: pip install 'resmol[verify]'",
        ) from None
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**config.to_hf()))
    model.load_state_dict(dict(weights), strict=True, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # not a weight: computed when it is made
    model.generation_config.eos_token_id = None  # compared continuations have a fixed length
    return model.eval()


def exact_model(config: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
    """Return the reference in float64.

    Its own norms would go through float32 whatever the weights' type; PyTorch's norm stands in for them. The tables
    of the rotation stay float32, as in every implementation: they are part of the definition.
    """
    model = reference_model(config, {name: tensor.double() for name, tensor in weights.items()})
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, device="meta")
                norm.weight = child.weight
                setattr(module, name, norm)
    return model
