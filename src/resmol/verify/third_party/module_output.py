"""Read what a module returns: logits and a loss, in any of the usual containers and shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from resmol.config.model_config import ModelConfig
from resmol.errors import CheckFailed

_NAMES_OF_LOGITS = ("logits", "lm_logits", "prediction_scores", "output", "out")
_NAMES_OF_LOSS = ("loss", "lm_loss")
_USUAL = "return logits [B, T, V]: alone, in a tuple, as `.logits`, or under the key 'logits'"


@dataclass(frozen=True)
class ModuleOutput:
    """What was found in a module's output.

    Attributes:
        logits: [B, T, V], or None where there are none.
        loss: A scalar, or None where there is none.
        note: Where the logits were found, and how they were brought into shape; empty for a plain tensor.
        refusal: Why there are no logits, in words.
        fix: What to change then.
    """

    logits: Tensor | None = None
    loss: Tensor | None = None
    note: str = ""
    refusal: str = ""
    fix: str = _USUAL

    def checked_logits(self) -> Tensor:
        """Return the logits (`CheckFailed` where there are none)."""
        if self.logits is None:
            raise CheckFailed(f"forward: {self.refusal}", fix=self.fix)
        return self.logits


def read_output(output: Any, ids: Int[Tensor, "B T"], config: ModelConfig) -> ModuleOutput:
    """Find logits and loss in what a module returned for some ids.

    A named entry (``logits``, ``loss``) comes first, then the first tensor that has the right shape. Logits [B*T, V]
    are reshaped. A scalar is a loss.
    """
    entries = list(_entries(output))
    loss = _loss_in(entries)
    batch, length = ids.shape
    wanted = (batch, length, config.vocab_size)
    for name, tensor in _named_first(entries, _NAMES_OF_LOGITS):
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            continue
        if tuple(tensor.shape) == wanted:
            return ModuleOutput(tensor, loss, "" if _plain(name) in ("", "logits") else f"logits are output{name}")
        if tuple(tensor.shape) == (batch * length, config.vocab_size):
            return ModuleOutput(tensor.unflatten(0, (batch, length)), loss, "logits [B*T, V] are reshaped to [B, T, V]")
    refusal, fix = _refusal(output, entries, loss, ids, config)
    return ModuleOutput(None, loss, "", refusal, fix)


def _entries(output: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor and float of an output with its place in it, nested ones included."""
    if isinstance(output, float):  # a loss on which .item() was called
        output = torch.tensor(output)
    if isinstance(output, Tensor):
        yield name, output
        return
    if depth > 2:
        return
    for key, value in _items(output):
        yield from _entries(value, f"{name}{key}", depth + 1)


def _items(output: Any) -> list[tuple[str, Any]]:
    if isinstance(output, Mapping):
        return [(f"[{key!r}]", value) for key, value in output.items()]
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return [(f".{field}", getattr(output, field)) for field in output._fields]
    if isinstance(output, tuple | list):
        return [(f"[{index}]", value) for index, value in enumerate(output)]
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [(f".{field.name}", getattr(output, field.name)) for field in dataclasses.fields(output)]
    attributes = getattr(output, "__dict__", None)
    return [(f".{key}", value) for key, value in attributes.items()] if isinstance(attributes, dict) else []


def _named_first(entries: list[tuple[str, Tensor]], names: tuple[str, ...]) -> list[tuple[str, Tensor]]:
    return sorted(entries, key=lambda entry: 0 if _plain(entry[0]) in names else 1)


def _plain(place: str) -> str:
    return place.strip(".[]'\"").lower()


def _loss_in(entries: list[tuple[str, Tensor]]) -> Tensor | None:
    scalars = [(name, tensor) for name, tensor in entries if tensor.numel() == 1 and tensor.is_floating_point()]
    ordered = _named_first(scalars, _NAMES_OF_LOSS)
    return ordered[0][1].reshape(()) if ordered else None


def _refusal(
    output: Any, entries: list[tuple[str, Tensor]], loss: Tensor | None, ids: Int[Tensor, "B T"], config: ModelConfig
) -> tuple[str, str]:
    """Return why there are no logits in an output, and what to change."""
    candidates = [tensor for _, tensor in _named_first(entries, _NAMES_OF_LOGITS) if tensor.numel() > 1]
    if not candidates:
        if loss is not None:
            return "the module returns the loss alone, without logits", "return the logits too: (logits, loss)"
        what = "nothing (None)" if output is None else f"a {type(output).__name__} without logits"
        return f"for ids of shape {list(ids.shape)} the module returned {what}", _USUAL
    tensor = candidates[0]
    shape, (batch, length), vocab = list(tensor.shape), ids.shape, config.vocab_size
    seen = f"for ids of shape {list(ids.shape)} the module returned shape {shape}"
    if not tensor.is_floating_point():
        return f"{seen} of type {tensor.dtype}: not logits", "return the logits, before any argmax"
    if tensor.layout != torch.strided or tensor.is_meta:
        return f"{seen}, {tensor.layout} on {tensor.device.type}", "return an ordinary tensor on the CPU"
    if shape[-1:] == [config.hidden_size] and shape[:-1] in ([batch, length], [batch * length]):
        return f"{seen}: hidden states [B, T, D]", "apply the output layer (lm_head) to them, and return logits"
    if shape in ([batch, vocab], [batch, 1, vocab], [vocab], [1, vocab]):
        return (
            f"{seen}: logits of the last position only",
            "return the logits of all positions, and take the last one where you generate",
        )
    if shape == [batch, vocab, length]:
        return f"{seen}: [B, V, T]", "return logits [B, T, V]: transpose them for cross_entropy only"
    if shape == [length, batch, vocab]:
        return f"{seen}: [T, B, V]", "return logits [B, T, V], with the batch first"
    if shape[-1:] != [vocab] and shape[:2] == [batch, length]:
        return f"{seen}: {shape[-1]} logits for {vocab} tokens", f"return one logit for each of {vocab} tokens"
    return f"{seen}; logits would be {[batch, length, vocab]}", _USUAL
