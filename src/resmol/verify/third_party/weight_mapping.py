"""Map third-party parameters to Hugging Face's names: by a map that the user gives, or by the words of their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TypeAlias

from jaxtyping import Shaped
from torch import Tensor

from resmol.config.model_config import ModelConfig
from resmol.errors import UsageError
from resmol.model.shapes import tensor_shapes
from resmol.system.untrusted_text import quoted
from resmol.verify.third_party.name_schemes import kind_of, recognize, scheme_of, unwrapped

MOST_NAMES = 16  # of a list that is shown
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# Their parameter -> Hugging Face's name, or several whose rows it holds one after the other; "" for one to complete.
NameMap: TypeAlias = Mapping[str, str | Sequence[str]]
NAME_MAP_FIX = "give a JSON object: their name -> Hugging Face's, or a list of those whose rows it holds"


@dataclass(frozen=True)
class Piece:
    """Some rows of a third-party parameter: one of Hugging Face's tensors."""

    parameter: str
    target: str
    start: int
    stop: int


@dataclass(frozen=True)
class WeightMapping:
    """Which of Hugging Face's tensors each third-party parameter holds.

    Attributes:
        pieces: Every tensor that was found, in the order of the parameters.
        extra: The kind (bias, norm, gain, positions, weight) of each parameter that SmolLM2 does not have.
        scheme: Whose names these are, in words; empty for Hugging Face's.
        missing: Hugging Face's names that no parameter holds.
        misshapen: What is wrong with the shape of a parameter, in words, by its name.
        layers: Hugging Face's name for each block, and for the final norm, by the module's own.
    """

    pieces: tuple[Piece, ...]
    extra: Mapping[str, str]
    scheme: str
    missing: tuple[str, ...]
    misshapen: Mapping[str, str]
    layers: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every weight of SmolLM2 has its place."""
        return not self.missing and not self.misshapen

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """Parameters that hold several tensors, with their names, as patterns with ``{}`` for the layer."""
        held: dict[str, list[str]] = {}
        for piece in self.pieces:
            held.setdefault(piece.parameter, []).append(piece.target)
        return {pattern(name): tuple(map(pattern, names)) for name, names in held.items() if len(names) > 1}


def pattern(name: str) -> str:
    """Return a name with ``{}`` for its first number."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "{}", name, count=1)


def map_weights(
    parameters: Mapping[str, Shaped[Tensor, ...]], config: ModelConfig, name_map: NameMap | None = None
) -> WeightMapping:
    """Find Hugging Face's name for each parameter.

    Args:
        parameters: By name; a tied output layer appears under both of its names.
        config: The architecture.
        name_map: What the user knows; ``{}`` stands for the number of the layer. Other names are recognized.

    Raises:
        UsageError: An entry of the map matches no parameter, has two ``{}``, or names no tensor of SmolLM2.
    """
    expected = {**tensor_shapes(config)}
    allowed = {**expected, HEAD: expected[EMBEDDING]}
    given = _from_map(list(parameters), name_map or {}, list(allowed))
    targets = {name: given.get(name) or _by_itself(name, allowed) for name in parameters}
    embeddings = {id(parameters[name]) for name, known in targets.items() if known == (EMBEDDING,)}
    for name, parameter in parameters.items():
        if id(parameter) in embeddings and targets[name] != (EMBEDDING,):
            targets[name] = (HEAD,)  # a map need not name a tied output layer a second time
    targets = _without_repetitions(targets, given)
    pieces, misshapen = _pieces(parameters, targets, allowed)
    found = {piece.target for piece in pieces} | {target for name in misshapen for target in targets[name]}
    if EMBEDDING not in found and HEAD in found and config.tie_word_embeddings:  # a tied pair under the head's name
        pieces = tuple(Piece(p.parameter, EMBEDDING, p.start, p.stop) if p.target == HEAD else p for p in pieces)
        found.add(EMBEDDING)
    return WeightMapping(
        pieces,
        {name: kind_of(name, parameters[name].dim()) for name, known in targets.items() if not known},
        scheme_of({name: known[0] for name, known in targets.items() if len(known) == 1 and name not in given}),
        tuple(name for name in expected if name not in found),
        misshapen,
        _layers(pieces),
    )


def _by_itself(name: str, allowed: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    plain = unwrapped(name)
    found = (plain,) if plain in allowed else recognize(plain)
    return found if all(target in allowed for target in found) else ()


def _without_repetitions(
    targets: Mapping[str, tuple[str, ...]], given: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Drop what was recognized in two parameters, unless one of them has the very name or is mapped."""
    counts = Counter(target for known in targets.values() for target in known)

    def kept(name: str, known: tuple[str, ...]) -> bool:
        return name in given or known == (unwrapped(name),) or all(counts[target] == 1 for target in known)

    return {name: known if kept(name, known) else () for name, known in targets.items()}


def _pieces(
    parameters: Mapping[str, Tensor],
    targets: Mapping[str, tuple[str, ...]],
    allowed: Mapping[str, tuple[int, ...]],
) -> tuple[tuple[Piece, ...], dict[str, str]]:
    pieces: list[Piece] = []
    misshapen: dict[str, str] = {}
    for name, known in targets.items():
        if not known:
            continue
        rows = [allowed[target][0] for target in known]
        wanted, shape = (sum(rows), *allowed[known[0]][1:]), tuple(parameters[name].shape)
        if shape != wanted:
            turned = " (transposed)" if shape == wanted[::-1] else ""
            misshapen[name] = f"{name} has shape {list(shape)}{turned} instead of {list(wanted)}"
            continue
        start = 0
        for target, count in zip(known, rows, strict=True):
            pieces.append(Piece(name, target, start, start + count))
            start += count
    return tuple(pieces), misshapen


def _layers(pieces: Sequence[Piece]) -> dict[str, str]:
    layers: dict[str, str] = {}
    for piece in pieces:
        if match := re.match(r"model\.layers\.(\d+)\.", piece.target):
            prefix = re.match(rf"(?:.*?\.)?[a-z_]*{match[1]}(?=\.)", piece.parameter)
            if prefix:
                layers[prefix[0]] = match[0][:-1]
        elif piece.target == "model.norm.weight" and "." in piece.parameter:
            layers[piece.parameter.rpartition(".")[0]] = "model.norm"
    return layers


# --- the user's map ------------------------------------------------------------------------------------------


def _from_map(names: Sequence[str], name_map: NameMap, allowed: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return what a map says about each parameter."""
    found: dict[str, tuple[str, ...]] = {}
    for entry, value in name_map.items():
        wanted = [value] if isinstance(value, str) else list(value)
        if not any(wanted):
            continue  # an entry that is still to be completed
        if any(text.count("{}") > 1 for text in (entry, *wanted)):
            raise UsageError(f"names: {quoted(entry)} has two {{}}", fix="write {} once, for the number of the layer")
        expression = "([0-9]+)".join(map(re.escape, entry.split("{}")))
        matches = {name: match for name in names if (match := re.fullmatch(expression, name))}
        if not matches and pattern(entry) not in map(pattern, names):  # it may name a layer of the larger model
            raise UsageError(f"names: {quoted(entry)} matches no parameter{_nearest(entry, names)}", fix=NAME_MAP_FIX)
        for name, match in matches.items():
            number = match[1] if "{}" in entry else ""
            found[name] = tuple(target.replace("{}", number) for target in wanted)
    unknown = sorted({target for known in found.values() for target in known} - set(allowed))
    if unknown:
        where = _nearest(unknown[0], allowed)
        raise UsageError(f"names: SmolLM2 has no {quoted(unknown[0])}{where}", fix=NAME_MAP_FIX)
    return found


def _nearest(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(pattern(name), sorted({pattern(item) for item in names}), n=1, cutoff=0.3)
    return f"; the nearest is {near[0]}" if near else ""


def how_many_are_missing(mapping: WeightMapping) -> str:
    """Return the number of missing names in words."""
    count = len(mapping.missing)
    return f"{count} of Hugging Face's names {'is' if count == 1 else 'are'} missing"


def names_in_words(parameters: Mapping[str, Tensor], mapping: WeightMapping) -> str:
    """Return both lists of names in lines: what is missing, and what the module has that is not known."""
    missing = dict.fromkeys(map(pattern, mapping.missing))
    own = dict.fromkeys(f"{pattern(name)} {list(parameters[name].shape)}" for name in mapping.extra)
    lines = [f"{how_many_are_missing(mapping)}:", *(f"  {name}" for name in missing)]
    lines += ["not recognized in the module:", *(f"  {name}" for name in list(own)[:MOST_NAMES])] if own else []
    return "\n".join(lines + ([f"  and {len(own) - MOST_NAMES} more"] if len(own) > MOST_NAMES else []))
