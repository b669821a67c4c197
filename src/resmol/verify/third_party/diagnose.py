"""Find the known bugs that reproduce what an implementation computes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from resmol.config.model_config import ModelConfig
from resmol.verify.parity import rms
from resmol.verify.third_party.known_bugs import KNOWN_BUGS, KnownBug, bugs_from
from resmol.verify.third_party.parts import ROTATION, Parts, forward, half_split, split_heads, turned

logger = logging.getLogger(__name__)

# Two float32 implementations of a small model differ by about 1e-6 of the size of the logits; bugs by over 1e-4.
SAME = 2e-5
# Each bug that is added brings the results this much closer, or it is not added.
CLOSER = 0.7
# Bugs that do not reproduce the results are named only if they explain at least this share of the difference.
EXPLAINED = 0.9
MOST_BUGS = 3
PAIRED, PAIR_TOKENS, PAIRS_TRIED_AGAIN = 20, 24, 8


Run: TypeAlias = Callable[[Int[Tensor, "B T"]], Float[Tensor, "B T _"]]


@dataclass(frozen=True)
class Setting:
    """Where an implementation is compared with variants of the architecture.

    Attributes:
        run: The implementation, with the weights: ids to logits, or to the output of a block.
        weights: By Hugging Face's names.
        config: The architecture.
        ids: Its input.
        last_block: The block whose output is compared; None for the logits.
    """

    run: Run
    weights: Mapping[str, Tensor]
    config: ModelConfig
    ids: Int[Tensor, "B T"]
    last_block: int | None = None

    @cached_property
    def found(self) -> Tensor:
        """What the implementation computes."""
        return self.run(self.ids)

    def computed(self, parts: Parts) -> Tensor:
        """Return what an implementation made of these parts computes."""
        return forward(self.weights, self.config, self.ids, parts, self.last_block)

    def distance(self, parts: Parts) -> float:
        """Return the distance of these parts' result from the one found, relative to its size."""
        return relative_distance(self.computed(parts), self.found)

    @cached_property
    def right(self) -> Tensor:
        """What the right architecture computes."""
        return self.computed(Parts())

    @property
    def differs(self) -> bool:
        """Whether the implementation is wrong here."""
        return not relative_distance(self.right, self.found) <= SAME

    @property
    def first_position(self) -> int:
        """The first position at which it differs by more than rounding."""
        error = (self.right - self.found).double().pow(2).mean(-1).sqrt().amax(0)
        wrong = error > 10 * SAME * rms(self.right)
        return int(wrong.int().argmax()) if bool(wrong.any()) else 0


def relative_distance(a: Tensor, b: Tensor) -> float:
    """Return the root mean square of a difference, relative to ``b``; infinity where it is not a number."""
    difference = rms(a - b)
    return difference / max(rms(b), math.ulp(0.0)) if math.isfinite(difference) else math.inf


@dataclass(frozen=True)
class Diagnosis:
    """The bugs found in an implementation.

    Attributes:
        bugs: The known bugs that bring our results closest to its own.
        remaining: The distance that remains, relative to the size of the results.
        before: The distance of the right architecture.
        evidence: The effect of the first bug in numbers; may be empty.
    """

    bugs: tuple[KnownBug, ...]
    remaining: float
    before: float
    evidence: str = ""

    @property
    def sure(self) -> bool:
        """Whether the bugs reproduce the results."""
        return bool(self.bugs) and self.remaining <= SAME

    @property
    def what(self) -> str:
        """The bugs in words; empty if there are none."""
        return "; and ".join(bug.what for bug in self.bugs)

    @property
    def fix(self) -> str:
        """What to change, in words."""
        return "; ".join(dict.fromkeys(bug.fix for bug in self.bugs))

    def __str__(self) -> str:
        if self.remaining != self.remaining:
            return "the logits are not numbers"
        if not self.bugs:
            return "none of the known bugs explains the difference"
        words = self.what + (f": {self.evidence}" if self.evidence else "")
        explained = 1 - self.remaining / self.before
        certain = "that reproduces its results" if self.sure else f"that explains {explained:.0%} of the difference"
        return f"{words} ({certain}, to {self.remaining:.0e})"


@torch.no_grad()
def diagnose(setting: Setting, known: Sequence[KnownBug] = KNOWN_BUGS, *, pairs: bool = True) -> Diagnosis:
    """Find the known bugs that reproduce an implementation's results, at most `MOST_BUGS` of them.

    Bugs that change nothing at this configuration are no suspects. Bugs are added one by one, nearest first. Where that
    does not reproduce the results, all pairs are ranked on a few tokens, and the best of them are compared on the same
    tokens as the single ones.

    Args:
        setting: Where the implementation is wrong.
        known: The bugs to try.
        pairs: Whether there is time to try every pair.
    """
    if not bool(torch.isfinite(setting.found).all()):
        return Diagnosis((), math.nan, math.nan)
    search = _Search(setting, known)
    chosen, remaining = search.extended(())
    if remaining > SAME and pairs:
        logger.info("no single known bug explains it: trying pairs")
        options = [search.extended(pair) for pair in search.nearest_pairs()]
        chosen, remaining = min([(chosen, remaining), *options], key=lambda option: option[1])
    if remaining > SAME and remaining > (1 - EXPLAINED) * search.before:
        chosen, remaining = (), search.before
    return Diagnosis(chosen, remaining, search.before, _stretch(chosen[0], setting) if chosen else "")


Chosen: TypeAlias = tuple[KnownBug, ...]


def _parts(bugs: Chosen) -> Parts:
    parts = Parts()
    for bug in bugs:
        parts = bug.applied_to(parts)
    return parts


def _combinable(bugs: Chosen, bug: KnownBug) -> bool:
    return not any(other.change.keys() & bug.change.keys() for other in bugs)


class _Search:
    """The suspects, and how far each of them alone is from what was found."""

    def __init__(self, setting: Setting, known: Sequence[KnownBug]) -> None:
        self._setting = setting
        self.before = relative_distance(setting.right, setting.found)
        self._suspects: list[KnownBug] = []
        self._alone: list[float] = []
        first = setting.first_position
        for bug in [*known, *(bugs_from(first) if first > 1 else [])]:
            computed = setting.computed(bug.applied_to(Parts()))
            if not relative_distance(computed, setting.right) <= SAME:
                self._suspects.append(bug)
                self._alone.append(relative_distance(computed, setting.found))

    def extended(self, bugs: Chosen) -> tuple[Chosen, float]:
        """Add the bug that brings the results closest, then the next one, as long as each helps clearly."""
        remaining = self._setting.distance(_parts(bugs)) if bugs else self.before
        while remaining > SAME and len(bugs) < MOST_BUGS:
            options = [(*bugs, bug) for bug in self._suspects if _combinable(bugs, bug)]
            scores = [self._setting.distance(_parts(option)) for option in options] if bugs else self._alone
            best = min(scores, default=math.inf)
            if best > CLOSER * remaining:
                break
            bugs, remaining = options[scores.index(best)], best
        return bugs, remaining

    def nearest_pairs(self) -> list[Chosen]:
        """Return the pair that comes closest, of those that do so on a few tokens; empty if there is none.

        Tried are the pairs of the nearest single bugs, and all pairs of bugs in the rotation: two of those can be far
        from what was found, each by itself.
        """
        few = replace(self._setting, ids=self._setting.ids[:, :PAIR_TOKENS])
        order = sorted(range(len(self._suspects)), key=self._alone.__getitem__)
        nearest = [self._suspects[index] for index in order[:PAIRED]]
        rotation = [bug for bug in self._suspects if bug.change.keys() <= ROTATION]
        pairs = [pair for group in (nearest, rotation) for pair in combinations(group, 2)]
        options: list[Chosen] = [pair for pair in pairs if _combinable(pair[:1], pair[1])]
        ranked = sorted((few.distance(_parts(pair)), index) for index, pair in enumerate(options))
        best = [options[index] for _, index in ranked[:PAIRS_TRIED_AGAIN]]
        return sorted(best, key=lambda pair: self._setting.distance(_parts(pair)))[:1]


def _stretch(bug: KnownBug, setting: Setting) -> str:
    """Return in words by how much a wrong rotation changes the length of the first layer's queries, if it does."""
    config, weights = setting.config, setting.weights
    parts = bug.applied_to(Parts())
    if parts.pairs is half_split:
        return ""
    x = F.rms_norm(weights["model.embed_tokens.weight"][setting.ids], (config.hidden_size,), None, config.rms_norm_eps)
    x = x * weights["model.layers.0.input_layernorm.weight"]
    query = split_heads(F.linear(x, weights["model.layers.0.self_attn.q_proj.weight"]), config.num_attention_heads)
    change = (turned(query, config.rope_theta, parts).norm(dim=-1) / query.norm(dim=-1) - 1).abs().max()
    return f"norm of q changes by up to {float(change):.0%}" if float(change) > 1e-3 else ""
