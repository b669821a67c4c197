"""Load our weights into a third-party module: translate names, compare shapes, guard every call."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from resmol.checks import Check
from resmol.config.model_config import ModelConfig
from resmol.errors import CheckFailed
from resmol.model.flops import total_parameters
from resmol.model.llama import CausalLM
from resmol.model.shapes import tensor_shapes

Factory = Callable[[ModelConfig], nn.Module]

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
WRAPPERS = ("_orig_mod.", "module.")  # torch.compile, DistributedDataParallel


@dataclass(frozen=True)
class MappedModule:
    """A module with our weights.

    Attributes:
        model: The module, in evaluation mode and float32.
        names: Hugging Face's name for each of its parameters.
    """

    model: nn.Module
    names: Mapping[str, str]

    def __call__(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Return its logits.

        Raises:
            CheckFailed: It raised an exception, or returned something else.
        """
        found = logits_in(self.call(ids))
        if found is None or found.shape[:2] != ids.shape or found.dim() != 3:
            what = "no tensor" if found is None else f"a tensor of shape {list(found.shape)}"
            raise CheckFailed(
                f"for ids of shape {list(ids.shape)} the module returned {what}",
                fix="return logits [B, T, V], alone, first in a tuple, or as `.logits`",
            )
        return found

    def call(self, *arguments: Any, **options: Any) -> Any:
        """Call the module; any exception becomes a `CheckFailed`."""
        return guarded(lambda: self.model(*arguments, **options))


def guarded(action: Callable[[], Any]) -> Any:
    """Run third-party code; any exception becomes a `CheckFailed` with its message and place."""
    try:
        return action()
    except Exception as error:  # third-party code can raise anything
        place, trace = "", error.__traceback__
        while trace is not None:
            place = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
            trace = trace.tb_next
        raise CheckFailed(
            f"{type(error).__name__}: {error}{place}", fix="make the module run with ids [B, T] alone"
        ) from error


def logits_in(output: Any) -> Tensor | None:
    """Return the logits in a module's output, or None."""
    first = getattr(output, "logits", output)
    first = first[0] if isinstance(first, tuple | list) and first else first
    return first if isinstance(first, Tensor) else None


def load_reference_weights(
    factory: Factory, weights: CausalLM, name_map: Mapping[str, str] | None
) -> tuple[MappedModule | None, list[Check]]:
    """Build the module and copy our weights into it.

    Parameters that SmolLM2 does not have, such as biases, are set to zero, so that the rest can still be compared.

    Args:
        factory: Takes the architecture, returns the module.
        weights: Our model.
        name_map: Hugging Face's name for each of its parameters; ``{}`` stands for the number of the layer.

    Returns:
        The module, or None where it has no parameter for some weight; and the checks so far.

    Raises:
        CheckFailed: The factory raised an exception, or returned no module.
    """
    model = guarded(lambda: factory(weights.config))
    if not isinstance(model, nn.Module):
        raise CheckFailed(f"the factory returned a {type(model).__name__}", fix="return a torch.nn.Module")
    model = model.float().eval()
    theirs = dict(model.named_parameters(remove_duplicate=False))
    names = {name: translated(name, name_map or {}) for name in theirs}
    ours = dict(weights.named_parameters(remove_duplicate=False))
    embeddings = {id(theirs[name]) for name, known in names.items() if known == "model.embed_tokens.weight"}
    for name, parameter in theirs.items():  # a map need not name a tied output layer a second time
        if names[name] not in ours and id(parameter) in embeddings:
            names[name] = "lm_head.weight"
    fits, named = _names(theirs, names, weights.config)
    checks = [_count(model, weights.config), named, _tying(theirs, names, weights.config)]
    if not fits:
        return None, checks
    with torch.no_grad():
        for name, parameter in theirs.items():
            if names[name] in ours:
                parameter.copy_(ours[names[name]])
            else:
                parameter.zero_()
    return MappedModule(model, names), checks


def translated(name: str, name_map: Mapping[str, str]) -> str:
    """Return Hugging Face's name, by the map, or else without the prefixes that wrappers add."""
    if name in name_map:
        return name_map[name]
    for pattern, target in name_map.items():
        if pattern.count("{}") == 1 and target.count("{}") == 1:
            before, after = map(re.escape, pattern.split("{}"))
            if match := re.fullmatch(f"{before}([0-9]+){after}", name):
                return target.replace("{}", match[1])
    for prefix in WRAPPERS:
        name = name.removeprefix(prefix)
    return name


def _count(model: nn.Module, config: ModelConfig) -> Check:
    counted, expected = sum(p.numel() for p in model.parameters()), total_parameters(config)
    return Check(
        "parameters",
        counted == expected,
        f"{counted:,}",
        f"{expected:,} by the closed form",
        "Biases, a layer too many, or a separate output layer.",
    )


def _names(theirs: Mapping[str, Tensor], names: Mapping[str, str], config: ModelConfig) -> tuple[bool, Check]:
    """Return whether every weight has a parameter of its shape, and the check of the names."""
    expected = tensor_shapes(config)
    allowed = {**expected, HEAD: expected[EMBEDDING]}
    shapes = {names[name]: tuple(parameter.shape) for name, parameter in theirs.items()}
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    for name, shape in shapes.items():
        if name in allowed and shape != allowed[name]:
            turned = " (transposed)" if shape == allowed[name][::-1] else ""
            problems.append(f"{name} has shape {list(shape)}{turned} instead of {list(allowed[name])}")
    fits = not problems
    problems += [f"{name} does not exist in SmolLM2" for name in shapes if name not in allowed]
    problems += [f"{name} has the prefix of a wrapper" for name in theirs if name.startswith(WRAPPERS)]
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return fits, Check(
        "names and shapes",
        not problems,
        f"{problems[0]}{more}" if problems else f"{len(theirs)} parameters",
        f"{len(expected)} tensors, by Hugging Face's names or the name map",
        "Missing, additional or transposed weights. Right names alone prove nothing; the other checks do.",
    )


def _tying(theirs: Mapping[str, Tensor], names: Mapping[str, str], config: ModelConfig) -> Check:
    heads = [parameter for name, parameter in theirs.items() if names[name] == HEAD]
    embeddings = [parameter for name, parameter in theirs.items() if names[name] == EMBEDDING]
    same = not heads or any(head is embedding for head in heads for embedding in embeddings)
    return Check(
        "tying",
        same == config.tie_word_embeddings,
        "one tensor" if same else "two tensors",
        "one tensor" if config.tie_word_embeddings else "two tensors",
        "An output layer that is a copy of the embeddings, or a new one: equal at best, and training drives the two "
        "apart.",
    )
