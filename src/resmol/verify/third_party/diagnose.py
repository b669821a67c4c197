"""Find the known bug that reproduces an implementation's wrong logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from resmol.config.model_config import ModelConfig
from resmol.verify.parity import rms
from resmol.verify.third_party.known_bugs import (
    KNOWN_BUGS,
    KnownBug,
    Parts,
    Turn,
    forward,
    split_heads,
    turn_half_split,
)

# Two float32 implementations of a tiny model differ by about 1e-6 of the size of the logits; bugs by over 1e-4.
SAME = 2e-5
CLOSER = 0.7
MOST_BUGS = 3
PAIR_TOKENS = 48

Run = Callable[[Int[Tensor, "B T"]], Float[Tensor, "B T V"]]


@dataclass(frozen=True)
class Diagnosis:
    """The bugs found in an implementation.

    Attributes:
        bugs: The known bugs that bring our logits closest to its own.
        remaining: The distance that remains, relative to the size of the logits.
        evidence: The effect of the first bug in numbers; may be empty.
    """

    bugs: tuple[KnownBug, ...]
    remaining: float
    evidence: str = ""

    @property
    def sure(self) -> bool:
        """Whether the bugs reproduce the logits."""
        return self.remaining <= SAME

    def __str__(self) -> str:
        if self.remaining != self.remaining:
            return "the logits are not numbers"
        if not self.bugs:
            return "no architectural bug shows here" if self.sure else "none of the known bugs explains the logits"
        words = "; and ".join(bug.what for bug in self.bugs) + (f": {self.evidence}" if self.evidence else "")
        certain = "that reproduces these logits" if self.sure else "the nearest of the known bugs, not all of it"
        return f"{words} ({certain}, to {self.remaining:.0e})"


def diagnose(
    run: Run, weights: Mapping[str, Tensor], config: ModelConfig, ids: Int[Tensor, "B T"], *, pairs: bool
) -> Diagnosis:
    """Find the known bugs that reproduce an implementation's logits.

    Args:
        run: The implementation; it has the weights.
        weights: By Hugging Face's names.
        config: The architecture.
        ids: Its input.
        pairs: Also try every pair of bugs; for tiny models.
    """
    found = run(ids)
    if not bool(torch.isfinite(found).all()):
        return Diagnosis((), math.nan)
    chosen, remaining = _one_after_the_other(_Distance(found, weights, config, ids))
    if pairs and remaining > SAME:
        short = ids[:, :PAIR_TOKENS]
        pair, left = _two_together(_Distance(run(short), weights, config, short))
        if left < remaining * CLOSER:
            chosen, remaining = pair, left
    return Diagnosis(chosen, remaining, _stretch(chosen[0], weights, config, ids) if chosen else "")


@dataclass(frozen=True)
class _Distance:
    """The distance of an implementation with given parts from the logits found, relative to their size."""

    found: Tensor
    weights: Mapping[str, Tensor]
    config: ModelConfig
    ids: Tensor

    def __call__(self, parts: Parts) -> float:
        difference = rms(forward(self.weights, self.config, self.ids, parts) - self.found)
        size = max(rms(self.found), math.ulp(0.0))
        return difference / size if math.isfinite(difference) else math.inf


def _one_after_the_other(distance: _Distance) -> tuple[tuple[KnownBug, ...], float]:
    """Add the bug that brings the logits closest, then the next one, as long as that helps."""
    chosen: tuple[KnownBug, ...] = ()
    parts = Parts()
    remaining = distance(parts)
    while remaining > SAME and len(chosen) < MOST_BUGS:
        scores = [(distance(bug.applied_to(parts)), index) for index, bug in enumerate(KNOWN_BUGS)]
        best, index = min(scores)
        if best > CLOSER * remaining:
            break
        chosen, parts, remaining = (*chosen, KNOWN_BUGS[index]), KNOWN_BUGS[index].applied_to(parts), best
    return chosen, remaining


def _two_together(distance: _Distance) -> tuple[tuple[KnownBug, ...], float]:
    best = math.inf
    pair: tuple[KnownBug, ...] = ()
    for first, second in combinations(KNOWN_BUGS, 2):
        if first.change.keys() & second.change.keys():
            continue
        score = distance(second.applied_to(first.applied_to(Parts())))
        if score < best:
            best, pair = score, (first, second)
        if best <= SAME:
            break
    return pair, best


def _stretch(bug: KnownBug, weights: Mapping[str, Tensor], config: ModelConfig, ids: Int[Tensor, "B T"]) -> str:
    """Return in words by how much a wrong rotation changes the length of the first layer's queries, if it does."""
    turn: Turn = bug.change.get("turn_query", turn_half_split)
    x = F.rms_norm(weights["model.embed_tokens.weight"][ids], (config.hidden_size,), None, config.rms_norm_eps)
    x = x * weights["model.layers.0.input_layernorm.weight"]
    query = split_heads(F.linear(x, weights["model.layers.0.self_attn.q_proj.weight"]), config.num_attention_heads)
    change = (turn(query, config.rope_theta).norm(dim=-1) / query.norm(dim=-1) - 1).abs().max()
    return f"norm of q changes by up to {float(change):.0%}" if float(change) > 1e-3 else ""
