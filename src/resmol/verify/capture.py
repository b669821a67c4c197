"""Capture what a model computes from some ids: logits, hidden states, loss and gradients, each under a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from resmol.model.cross_entropy import IGNORE_INDEX
from resmol.model.kv_cache import KVCache
from resmol.model.llama import CausalLM

Captured: TypeAlias = dict[str, Tensor]
Forward: TypeAlias = Callable[[Int[Tensor, "B T"]], tuple[Tensor, Tensor]]

LOSS_CHUNK = 16  # tokens; a short sequence has several chunks, and the last one is shorter
# A sequence enters the cache in these parts: a prompt, single tokens, several at once.
CACHE_PARTS = (9, 1, 3, 1, 1)


def capture(
    model: nn.Module,
    ids: Int[Tensor, "B T"],
    forward: Forward,
    layers: Mapping[str, str] | None = None,
    *,
    loss_scale: float = 1.0,
) -> Captured:
    """Run a model forward and backward; its ``.grad`` fields and settings stay as they are.

    Args:
        model: The model.
        ids: Its input.
        forward: Returns its logits and its loss.
        layers: Hugging Face's name for each block and the final norm, by the model's own, where they differ.
        loss_scale: What the loss is multiplied by before the gradients are computed, and these are divided by.

    Returns:
        ``logits``, ``loss``, ``hidden states <module>`` for every block and the final norm, and
        ``gradients <parameter>``, by the model's own name, for every parameter that the loss depends on.
    """
    values: Captured = {}
    parameters = dict(model.named_parameters())
    before = {name: p.requires_grad for name, p in parameters.items()}
    model.requires_grad_(requires_grad=True)
    try:
        with hidden_states(model, values, layers), torch.enable_grad():
            logits, loss = forward(ids)
            gradients = _gradients(loss, list(parameters.values()), loss_scale)
    finally:
        for name, p in parameters.items():
            p.requires_grad_(before[name])
    values |= {"loss": loss.detach(), "logits": logits.detach()}
    pairs = zip(parameters, gradients, strict=True)
    return values | {f"gradients {name}": gradient for name, gradient in pairs if gradient is not None}


def _gradients(loss: Tensor, parameters: list[nn.Parameter], scale: float) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad:  # a third-party model that detaches everything
        return (None,) * len(parameters)
    gradients = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
    return gradients if scale == 1.0 else tuple(g if g is None else g / scale for g in gradients)


@contextmanager
def hidden_states(model: nn.Module, values: Captured, layers: Mapping[str, str] | None) -> Iterator[None]:
    """Capture the output of every block and of the final norm, by forward hooks."""

    def is_layer(name: str) -> bool:
        return name == "model.norm" or (name.startswith("model.layers.") and name.count(".") == 2)

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(hidden, Tensor):
                values[f"hidden states {name}"] = hidden.detach()

        return hook

    names = {name: name for name, _ in model.named_modules() if is_layer(name)} if layers is None else layers
    modules = {names[name]: module for name, module in model.named_modules() if name in names}
    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def our_forward(model: CausalLM) -> Forward:
    """Return our model's logits as inference computes them, and its loss as training does, with the labels shifted."""

    def forward(ids: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = model(ids)
        targets = F.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX)  # the hidden states of all T positions are compared
        return logits, model.loss(ids, targets, chunk_tokens=LOSS_CHUNK) / ids[:, 1:].numel()

    return forward


def reference_forward(model: Callable[..., Any]) -> Forward:
    """Return the reference with its own loss; it shifts the labels inside."""

    def forward(ids: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        output = model(ids, labels=ids)
        return output.logits, output.loss

    return forward


def logits_forward(model: Callable[..., Any]) -> Forward:
    """Return a model that computes logits alone, with PyTorch's loss, in the type of the logits."""

    def forward(ids: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        output = model(ids)
        logits = getattr(output, "logits", output)
        return logits, next_token_loss(logits, ids)

    return forward


def next_token_loss(logits: Float[Tensor, "B T V"], ids: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of position t's logits with the token at t + 1."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def our_logits_with_cache(model: CausalLM, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
    """Return our logits when the sequence enters the key/value cache in parts."""
    cache = KVCache(model.config, ids.shape[0], ids.shape[1], model.lm_head.weight.dtype)
    return torch.cat([model(part, cache=cache) for part in _parts(ids)], dim=1)


@torch.no_grad()
def reference_logits_with_cache(model: Any, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
    """Return the reference's logits when the sequence enters its own cache in the same parts."""
    logits, cache = [], None
    for part in _parts(ids):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _parts(ids: Int[Tensor, "B T"]) -> Iterator[Int[Tensor, "B part"]]:
    rest = ids
    for size in CACHE_PARTS:
        if rest.shape[1]:
            yield rest[:, :size]
        rest = rest[:, size:]
    if rest.shape[1]:
        yield rest
