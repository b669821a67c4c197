"""The independent reference: transformers' LlamaForCausalLM, in the weights' type and in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from resmol.config.model_config import ModelConfig
from resmol.errors import DataError


def reference_model(config: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
    """Return transformers' model with these weights, in their type; the memory of the weights is shared.

    Its random initialization is skipped: every weight comes from ``weights``, or the load fails.

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
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # not a weight: computed by its constructor
    model.generation_config.eos_token_id = None  # compared continuations have a fixed length
    return model.eval()


def float64_reference(config: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
    """Return the reference in float64, from which all errors are measured.

    Its own norms compute in float32 whatever the weights' type; PyTorch's norm replaces them. The rotation's tables
    stay float32, as in every implementation: they are part of the definition.
    """
    model = reference_model(config, {name: tensor.double() for name, tensor in weights.items()})
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, device="meta")
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


def reference_mask(document_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"]:
    """Return the attention mask in transformers' form: each position sees its own document, up to itself."""
    length = document_ids.shape[1]
    mask = torch.zeros(len(document_ids), 1, length, length, dtype=torch.bool)
    for row, documents in enumerate(document_ids.tolist()):
        for position, document in enumerate(documents):
            mask[row, 0, position, documents.index(document) : position + 1] = True
    return mask
