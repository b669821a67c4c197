"""Parity with transformers, with tolerances that are derived.

The reference runs in float64 as well. Its own float32 (or bfloat16) result misses that by some rounding error; ours may
miss it by no more than a small factor of the same. A wrong architecture misses it by orders of magnitude, and nobody
has to guess a tolerance. Errors are root mean squares over a tensor: their ratio is steady, where the ratio of two
largest errors is a matter of luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from resmol.checks import Check
from resmol.config.model_config import ModelConfig
from resmol.inference.generate import generate
from resmol.inference.sampling_params import SamplingParams
from resmol.model.llama import CausalLM
from resmol.verify.capture import (
    Observation,
    logits_forward,
    observe,
    our_forward,
    our_logits_with_cache,
    reference_forward,
    reference_logits_with_cache,
)
from resmol.verify.reference import exact_model, reference_model

Precision: TypeAlias = Literal["float32", "bfloat16", "bfloat16 autocast"]

# Our error against float64 may be this many times the reference's own, plus this many units in the last place.
FACTOR, ULPS = 4.0, 4.0
GREEDY_TOKENS = 12
PROMPT_TOKENS = 8
SEQUENCE = 24

GUARDS = {
    "weights": "Renamed, transposed or missing tensors: an export that nobody else can load.",
    "logits": "Anything wrong between ids and logits: rotation, mask, head order, norms, scaling. Comparing key names "
    "would not see it: the original student's check did that, and its logits were off by 37.",
    "hidden states": "An error that a later layer hides; the first layer that differs is the one to look at.",
    "loss": "Labels shifted twice (the model learns token t + 2) or never (it learns to copy: the loss falls to 0).",
    "gradients": "A branch that is detached, a tied weight that receives half of its gradient, a mean of means: the "
    "forward pass looks right and training is wrong.",
    "key/value cache": "New tokens that get the wrong positions or see the wrong past once a cache is used.",
    "greedy tokens": "Everything together: what a user would see. One wrong position after the prompt changes it.",
}


def ids_for(vocab_size: int, batch: int, length: int, seed: int = 4) -> Int[Tensor, "B T"]:
    """Return random token ids, the same ones each time."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Baseline:
    """What others are compared with.

    Attributes:
        ids: What the models are given.
        exact: The float64_reference, in float64.
        reference: transformers' model with the weights.
        reference_errors: How far the reference's own results are from the float64_reference.
        precision: What the reference, and whoever is compared with it, computes in.
    """

    ids: Int[Tensor, "B T"]
    exact: Observation
    reference: Any
    reference_errors: dict[str, float]
    precision: Precision

    def compare(self, group: str, found: Mapping[str, float]) -> Check:
        """Compare the errors of somebody's results with those of the reference."""
        return compare(group, found, self.reference_errors, self.exact, self.precision)


def baseline(
    config: ModelConfig, weights: Mapping[str, Tensor], precision: Precision = "float32", sequence: int = SEQUENCE
) -> Baseline:
    """Run the reference, also in float64, with these weights (errors: see `reference_model`)."""
    ids = ids_for(config.vocab_size, 2, min(sequence, config.max_position_embeddings))
    reference = reference_model(config, weights)
    float64_reference = exact_model(config, weights)
    exact = observe(float64_reference, ids, logits_forward(float64_reference))
    del float64_reference  # twice the size of the model
    with arithmetic(precision):
        theirs = observe(reference, ids, reference_forward(reference))
        if precision != "bfloat16 autocast":  # both caches have one type, autocast mixes two
            exact["key/value cache"] = exact["logits"]  # with or without, the right answer is the same
            theirs["key/value cache"] = reference_logits_with_cache(reference, ids)
    return Baseline(ids, exact, reference, errors(theirs, exact), precision)


def parity(model: CausalLM, precision: Precision = "float32", *, sequence: int = SEQUENCE) -> list[Check]:
    """Compare a model with the reference that has the same weights: every quantity that training depends on.

    Args:
        model: The model, on the CPU, in float32, or in bfloat16 for the precision of that name.
        precision: What both compute in.
        sequence: T, the length of the sequences that both are given.
    """
    try:
        base = baseline(model.config, model.state_dict(), precision, sequence)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        return [Check("weights load", False, reason, "a strict load_state_dict", GUARDS["weights"])]
    groups = ["logits", "hidden states", "loss", "gradients"]
    with arithmetic(precision):
        ours = observe(model, base.ids, our_forward(model))
        if "key/value cache" in base.exact:
            groups.append("key/value cache")
            ours["key/value cache"] = our_logits_with_cache(model, base.ids)
    our_errors = errors(ours, base.exact)
    checks = [base.compare(group, our_errors) for group in groups]
    return checks if precision != "float32" else [*checks, greedy(model, base.reference)]


def arithmetic(precision: Precision) -> Any:
    """Return the context in which a model computes in this precision."""
    return torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16 autocast" else nullcontext()


def unit(precision: Precision) -> float:
    """Return one unit in the last place, relative to the number."""
    return torch.finfo(torch.float32 if precision == "float32" else torch.bfloat16).eps


# --- comparing -----------------------------------------------------------------------------------------------


def rms(values: Tensor) -> float:
    """Return the root mean square, in float64."""
    return float(torch.linalg.vector_norm(values.detach(), dtype=torch.float64)) / math.sqrt(values.numel())


def errors(observed: Mapping[str, Tensor], exact: Observation) -> dict[str, float]:
    """Return the root mean square error of each quantity; a missing one, or one of another shape, is infinitely off."""
    found: dict[str, float] = {}
    for name, right in exact.items():
        value = observed.get(name)
        same_shape = value is not None and value.shape == right.shape
        found[name] = rms(value.double() - right) if value is not None and same_shape else math.inf
    return found


def tolerance(reference_error: float, size: float, precision: Precision) -> float:
    """Return how large an error may be, from the reference's own and the size of the values."""
    return FACTOR * reference_error + ULPS * unit(precision) * size


def compare(
    group: str, ours: Mapping[str, float], theirs: Mapping[str, float], exact: Observation, precision: Precision
) -> Check:
    """Compare all quantities of a group; the one that comes closest to its tolerance, or passes it, is reported."""
    names = [name for name in exact if name.startswith(group)]
    worst, share_of_worst = "", -1.0
    for name in names:
        share = ours[name] / max(tolerance(theirs[name], rms(exact[name]), precision), math.ulp(0.0))
        if not share <= share_of_worst:  # also true for NaN, which then stays
            worst, share_of_worst = name, share
        if math.isnan(share):
            break
    size = max(rms(exact[worst]), math.ulp(0.0))
    mine, reference = ours[worst] / size, theirs[worst] / size
    where = "" if worst == group else f" in {worst.removeprefix(group).strip()}"
    count = f"{len(names)} compared; " if len(names) > 1 else ""
    missing = "missing, or of another shape" if math.isinf(mine) else f"error {mine:.1e}"
    return Check(
        group,
        share_of_worst <= 1.0,
        f"{count}{missing}{where}",
        f"at most {FACTOR * reference + ULPS * unit(precision):.1e}: {FACTOR:g} x the reference's own error against "
        f"float64 ({reference:.1e}) + {ULPS:g} ulp",
        GUARDS[group],
    )


@torch.no_grad()
def greedy(model: CausalLM, reference: Any) -> Check:
    """Compare greedy continuations: ours, with its cache, and the reference's."""

    def written(prompt: Int[Tensor, "1 T"], count: int) -> list[int]:
        greedily = SamplingParams(max_new_tokens=count, temperature=0.0)
        return list(generate(model, prompt[0].tolist(), greedily, eos_id=None))

    return greedy_check(reference, model.config, model, written)


@torch.no_grad()
def greedy_check(
    reference: Any,
    config: ModelConfig,
    run: Callable[[Int[Tensor, "1 T"]], Tensor],
    written: Callable[[Int[Tensor, "1 T"], int], list[int]] | None,
) -> Check:
    """Compare greedy continuations with the reference's `generate`, with its cache.

    Args:
        reference: transformers' model.
        config: The architecture.
        run: Returns logits without a cache: one pass over the reference's continuation tells what each token would be.
        written: Returns the continuation that the implementation writes with its own cache, if it has one.
    """
    prompt = ids_for(config.vocab_size, 1, max(1, min(PROMPT_TOKENS, config.max_position_embeddings // 2)))
    start, count = prompt.shape[1], min(GREEDY_TOKENS, config.max_position_embeddings - prompt.shape[1])
    options: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    whole = reference.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    right = whole[0, start:].tolist()
    found = {
        "without a cache": run(whole[:, :-1])[0, start - 1 :].argmax(-1).tolist(),
        "in one pass of the reference": reference(whole[:, :-1]).logits[0, start - 1 :].argmax(-1).tolist(),
    }
    if written is not None:
        found = {"with the cache": written(prompt, count)} | found
    equal = {how: sum(map(int.__eq__, tokens, right)) for how, tokens in found.items()}
    return Check(
        "greedy tokens",
        all(tokens == right for tokens in found.values()),
        ", ".join(f"{number} of {count} {how}" for how, number in equal.items()),
        "all equal to transformers' generate with its cache",
        GUARDS["greedy tokens"],
    )
