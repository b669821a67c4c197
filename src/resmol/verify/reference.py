"""The independent reference: transformers' LlamaForCausalLM, in the weights' type and in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from resmol.config.model_config import ModelConfig
from resmol.errors import DataError
from resmol.model.linear import MatmulBackend, has_onednn
from resmol.model.llama import Attention
from resmol.system.installation import install_hint


class Arrangement(NamedTuple):
    """A right way to compute the same numbers: it changes the order of the sums, and so the rounding.

    Attributes:
        attention: PyTorch's fused attention, or products and a softmax.
        matmul_backend: The library of the products with a weight.
        threads: PyTorch's threads, which share each sum among them.
    """

    attention: Attention
    matmul_backend: MatmulBackend
    threads: int


def arrangements(dtype: torch.dtype) -> tuple[Arrangement, ...]:
    """Return arrangements that vary attention, library and threads; products in bfloat16 have one library."""
    several = max(2, torch.get_num_threads())
    backends: tuple[MatmulBackend, ...] = ("mkl", "onednn") if dtype == torch.float32 and has_onednn() else ("mkl",)
    return tuple(
        way for backend in backends for way in (Arrangement("sdpa", backend, several), Arrangement("eager", backend, 1))
    )


@contextmanager
def arranged(reference: Any, arrangement: Arrangement) -> Iterator[None]:
    """Let transformers' model compute in this arrangement while the context is open."""
    threads, attention = torch.get_num_threads(), reference.config._attn_implementation
    torch.set_num_threads(arrangement.threads)
    reference.set_attn_implementation(arrangement.attention)
    try:
        with _ProductsByOneDNN() if arrangement.matmul_backend == "onednn" else nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)
        reference.set_attn_implementation(attention)


class _ProductsByOneDNN(TorchFunctionMode):
    """Replaces ``F.linear`` by oneDNN's product, whose gradients are PyTorch's own: nothing of ours is in it."""

    def __torch_function__(self, function: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear and args[0].dtype == torch.float32:
            x, weight = args[:2]
            return torch._C._nn.mkldnn_linear(x.to_mkldnn(), weight, None).to_dense()
        return function(*args, **(kwargs or {}))


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
            fix=f"install it: {install_hint('verify')}",
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


def reference_mask(
    document_ids: Int[Tensor, "B T"], attention: Attention
) -> Bool[Tensor, "B 1 T T"] | Float[Tensor, "B 1 T T"]:
    """Return the attention mask in transformers' form: each position sees its own document, up to itself.

    Fused attention takes truth values, the eager one numbers that it adds to the scores.
    """
    length = document_ids.shape[1]
    mask = torch.zeros(len(document_ids), 1, length, length, dtype=torch.bool)
    for row, documents in enumerate(document_ids.tolist()):
        for position, document in enumerate(documents):
            mask[row, 0, position, documents.index(document) : position + 1] = True
    return mask if attention == "sdpa" else torch.where(mask, 0.0, torch.finfo(torch.float32).min)
