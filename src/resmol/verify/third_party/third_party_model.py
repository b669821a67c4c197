"""A third-party implementation as the checks see it: logits, loss and gradients by Hugging Face's names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from resmol.config.model_config import ModelConfig
from resmol.errors import CheckFailed
from resmol.system.untrusted_text import listed
from resmol.verify.capture import Captured, capture, next_token_loss
from resmol.verify.third_party.factory import Built, Factory, build
from resmol.verify.third_party.guarded import Phase, guarded
from resmol.verify.third_party.module_output import ModuleOutput, read_output
from resmol.verify.third_party.weight_mapping import EMBEDDING, HEAD, NameMap, WeightMapping, map_weights, pattern

_LABELS = ("labels", "label_ids", "targets", "target", "label", "y", "lm_labels", "tgt")
_IDS = ("input_ids", "ids", "idx", "x", "tokens", "inputs", "input")
# Arguments without a default that a causal model is usually called with, and what they are for whole texts.
_USUAL_ARGUMENTS: dict[str, Callable[[Int[Tensor, "B T"]], Any]] = {
    "attention_mask": torch.ones_like,
    "position_ids": lambda ids: torch.arange(ids.shape[1]).expand_as(ids),
    "positions": lambda ids: torch.arange(ids.shape[1]),
    "start_pos": lambda _ids: 0,
}
_NEUTRAL_IS_ONE = ("norm", "gain")


@dataclass
class ThirdPartyModel:
    """A third-party module, built from an architecture; it keeps its own weights until `load`.

    Every call of the module is guarded: whatever it raises, and every output that holds no logits, is a `CheckFailed`
    with words, the student's own line and a fix.

    Attributes:
        module: The module, in evaluation mode, in float32, on the CPU.
        config: The architecture that it was built from.
        mapping: Which of SmolLM2's weights each of its parameters holds (`complete`, `missing`, `extra`, `fused`).
        built: How the factory was called; ``built.own_config`` is the student's configuration class.
        notes: What was recognized or made neutral, in words, for the user; grows with the first outputs.
        label_argument: The name under which its forward takes labels, or None.
    """

    module: nn.Module
    config: ModelConfig
    mapping: WeightMapping
    built: Built
    notes: list[str]
    label_argument: str | None
    _ids_argument: str | None = None
    _fill: dict[str, Callable[[Tensor], Any]] = field(default_factory=dict)
    _labels_for_logits: bool = False

    def logits(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Return its logits, wherever they are in what it returns.

        Raises:
            CheckFailed: It raised an exception, or returned no logits of all positions.
        """
        output = self._read(ids, ids if self._labels_for_logits else None)
        if output.logits is None and self.label_argument and not self._labels_for_logits:
            with_labels = self._read(ids, ids)
            if with_labels.logits is not None:
                self._labels_for_logits = True
                self._note(f"all logits are returned only when `{self.label_argument}` is given, so it is")
                return with_labels.logits
        return output.checked_logits()

    __call__ = logits

    def loss(self, ids: Int[Tensor, "B T"], labels: Int[Tensor, "B T"]) -> Float[Tensor, ""] | None:
        """Return the loss that it computes itself from labels; None where it takes none, or returns no loss.

        Raises:
            CheckFailed: It raised an exception.
        """
        return self._read(ids, labels).loss if self.label_argument else None

    def capture(self, ids: Int[Tensor, "B T"]) -> Captured:
        """Return logits, loss, hidden states and gradients by Hugging Face's names; see `resmol.verify.capture`.

        The loss is PyTorch's, of its logits. Gradients of fused weights are cut into their parts.

        Raises:
            CheckFailed: It raised an exception, forward or backward.
        """

        def forward(ids: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
            logits = self.logits(ids)
            return logits, next_token_loss(logits.float(), ids)

        values = guarded(Phase.BACKWARD, lambda: capture(self.module, ids, forward, self.mapping.layers))
        gradients = {name: values.pop(f"gradients {name}", None) for name, _ in self.module.named_parameters()}
        tied = self.tied
        for piece in self.mapping.pieces:
            gradient = gradients.get(piece.parameter)  # a tied weight has its gradient under one of its names
            if gradient is not None:
                target = EMBEDDING if tied and piece.target == HEAD else piece.target
                values[f"gradients {target}"] = gradient[piece.start : piece.stop]
        return values

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that it holds now, by Hugging Face's names; they share its memory."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        return {p.target: parameters[p.parameter].detach()[p.start : p.stop] for p in self.mapping.pieces}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into it, and make parameters that SmolLM2 does not have neutral: norms and gains 1, others 0.

        Args:
            weights: By Hugging Face's names; an output layer that is missing there is the embedding.
        """
        own = self.weights()
        for target, rows in own.items():
            rows.copy_(weights[target] if target in weights else weights[EMBEDDING])
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        for name, kind in self.mapping.extra.items():
            parameters[name].fill_(1.0 if kind in _NEUTRAL_IS_ONE else 0.0)

    @property
    def tied(self) -> bool:
        """Whether the embedding and the output layer are one tensor."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        held = {piece.target: parameters[piece.parameter] for piece in self.mapping.pieces}
        return HEAD not in held or held[HEAD] is held.get(EMBEDDING)

    def _read(self, ids: Int[Tensor, "B T"], labels: Int[Tensor, "B T"] | None) -> ModuleOutput:
        options = {name: make(ids) for name, make in self._fill.items()}
        if labels is not None and self.label_argument:
            options[self.label_argument] = labels.clone()
        arguments = [] if self._ids_argument else [ids.clone()]
        if self._ids_argument:
            options[self._ids_argument] = ids.clone()
        returned = guarded(Phase.FORWARD, lambda: self.module(*arguments, **options))
        output = read_output(returned, ids, self.config)
        self._note(output.note)
        if output.logits is not None and not torch.is_autocast_enabled("cpu") and output.logits.dtype != torch.float32:
            self._note(f"logits are returned in {_written(output.logits.dtype)}")
        return output

    def _note(self, text: str) -> None:
        if text and text not in self.notes:
            self.notes.append(text)


def build_third_party(factory: Factory, config: ModelConfig, name_map: NameMap | None = None) -> ThirdPartyModel:
    """Build a third-party implementation, and find its weights.

    Args:
        factory: A class, a function or a module (see `build`).
        config: The architecture.
        name_map: Hugging Face's names for its parameters, where they are not recognized.

    Raises:
        CheckFailed: The factory raised an exception, or returned no module.
        UsageError: The map does not fit the module.
    """
    built = build(factory, config)
    module, types = guarded(Phase.BUILDING, lambda: _for_comparison(built.module))
    parameters = dict(module.named_parameters(remove_duplicate=False))
    mapping = map_weights(parameters, config, name_map)
    ids_argument, label_argument, fill = _forward_arguments(module)
    notes = [note for note in (built.note, _types_note(types), *_mapping_notes(mapping)) if note]
    return ThirdPartyModel(module, config, mapping, built, notes, label_argument, ids_argument, fill)


def build_small(factory: Factory, config: ModelConfig, name_map: NameMap | None = None) -> ThirdPartyModel | None:
    """Build an implementation at another size, or return None where the factory builds one size only."""
    try:
        model = build_third_party(factory, config, name_map)
    except CheckFailed:  # hard-coded sizes are not a mistake
        return None
    return model if model.mapping.complete else None


def _for_comparison(module: nn.Module) -> tuple[nn.Module, set[torch.dtype]]:
    if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters()):
        raise CheckFailed("building: a parameter has no shape yet", fix="give every layer its sizes: no LazyLinear")
    types = {parameter.dtype for parameter in module.parameters()}
    return module.cpu().float().eval(), types


def _types_note(types: set[torch.dtype]) -> str:
    others = sorted(map(_written, types - {torch.float32}))
    return f"built in {' and '.join(others)}, compared in float32" if others else ""


def _written(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _mapping_notes(mapping: WeightMapping) -> list[str]:
    notes = [f"names are {mapping.scheme}"] if mapping.scheme else []
    for name, targets in mapping.fused.items():
        parts = ", ".join(target.split(".")[-2] for target in targets)
        notes.append(f"{name} holds {parts}, one after the other")
    if mapping.complete:
        for kind in dict.fromkeys(mapping.extra.values()):
            names = list(dict.fromkeys(pattern(name) for name, of in mapping.extra.items() if of == kind))
            value = 1 if kind in _NEUTRAL_IS_ONE else 0
            notes.append(f"set to {value}, since SmolLM2 has no such {kind}: {listed(names, 6)}")
    return notes


def _forward_arguments(module: nn.Module) -> tuple[str | None, str | None, dict[str, Callable[[Tensor], Any]]]:
    """Return the name of the ids where they need one, that of the labels, and how to fill other required arguments."""
    inner = getattr(module, "_orig_mod", module)  # torch.compile's own forward takes anything
    try:
        parameters = inspect.signature(inner.forward).parameters
    except (TypeError, ValueError):
        return None, None, {}
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_positional = any(
        p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values()
    )
    ids = None if takes_positional else next((name for name in _IDS if name in named), None)
    first = ids or next(iter(parameters), None)
    labels = next((name for name in _LABELS if name in named and name != first), None)
    required = [name for name, p in named.items() if p.default is p.empty and name not in (first, labels)]
    fill = {name: _USUAL_ARGUMENTS[name] for name in required if name in _USUAL_ARGUMENTS}
    if unknown := [name for name in required if name not in fill]:
        raise CheckFailed(f"forward: it also needs `{unknown[0]}`", fix=f"give `{unknown[0]}` a default")
    if labels and named[labels].default is named[labels].empty:
        fill[labels] = torch.clone
    return ids, labels, fill
