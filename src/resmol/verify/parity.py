"""Parity with transformers, with derived tolerances.

The reference runs in float64 as well. Its own float32 (or bfloat16) result misses that by some rounding error; ours may
miss it by no more than a small factor of the same. A wrong architecture misses it by orders of magnitude, and nobody
has to guess a tolerance. How much a right computation rounds depends on the order of its sums, so the reference's error
is the largest of several right arrangements: both matmul libraries, fused and eager attention, one thread and several.
Errors are root mean squares over a tensor: their ratio is steady, where the ratio of two largest errors is a matter of
luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from resmol.checks import Check, largest
from resmol.config.model_config import ModelConfig
from resmol.inference.generate import generate
from resmol.inference.sampling_params import SamplingParams
from resmol.model.llama import Attention, CausalLM
from resmol.verify.capture import (
    Captured,
    Forward,
    capture,
    logits_forward,
    our_forward,
    our_logits_with_cache,
    reference_forward,
    reference_logits_with_cache,
)
from resmol.verify.reference import (
    Arrangement,
    arranged,
    arrangements,
    float64_reference,
    reference_mask,
    reference_model,
)

Precision: TypeAlias = Literal["float32", "bfloat16", "bfloat16 autocast", "float16 autocast"]

# Our error against float64 may be this many times the reference's own, plus this many units in the last place. Over 20
# seeds at nano and on the published weights, right computations with either matmul library used 0.2 to 0.4 of that.
FACTOR, ULPS = 4.0, 4.0
LOSS_SCALE = 2.0**12  # of float16, for the reference and for ours
GREEDY_TOKENS = 12
PROMPT_TOKENS = 8
SEQUENCE = 24

GUARDS = {
    "weights": "Renamed, transposed or missing tensors: an export that nobody else can load.",
    "logits": "Anything wrong between ids and logits: rotation, mask, head order, norms, scaling. Comparing key names "
    "would not see it: the original student's check did that, and its logits were off by 37.",
    "hidden states": "An error that a later layer hides; the first layer that differs is the one to look at.",
    "loss": "Labels shifted twice (the model learns token t + 2) or never (it learns to copy: the loss falls to 0).",
    "gradients": "A detached branch, or a tied weight that receives half of its gradient: the forward pass looks right "
    "and training is wrong.",
    "key/value cache": "New tokens that get the wrong positions or see the wrong past once a cache is used.",
    "greedy tokens": "Everything together, as a user sees it. One wrong position after the prompt changes them.",
}


def ids_for(vocab_size: int, batch: int, length: int, seed: int = 4) -> Int[Tensor, "B T"]:
    """Return random token ids, the same ones for the same seed."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Baseline:
    """The reference's results, and how far they are from float64.

    Attributes:
        ids: The input of the models.
        document_ids: The document of each token, where attention stays inside a document; None elsewhere.
        exact: The float64 reference's results.
        reference: transformers' model with the weights.
        reference_errors: The root mean square error of each of its results against float64, the largest of the
            right arrangements.
        precision: The arithmetic of the reference, and of whatever is compared with it.
    """

    ids: Int[Tensor, "B T"]
    document_ids: Int[Tensor, "B T"] | None
    exact: Captured
    reference: Any
    reference_errors: dict[str, float]
    precision: Precision

    def compare(self, group: str, errors: Mapping[str, float]) -> Check:
        """Compare an implementation's errors with the reference's, for the results whose names begin with a group."""
        names = [name for name in self.exact if name.startswith(group)]
        return self.compare_all(group, names, errors, GUARDS[group])

    def compare_all(self, row: str, names: Sequence[str], errors: Mapping[str, float], guards: str) -> Check:
        """Compare some errors in one row, which reports the one nearest to its tolerance, or furthest above it."""
        worst, share_of_worst = "", -1.0
        for name in names:
            allowed = tolerance(self.reference_errors[name], rms(self.exact[name]), self.precision)
            share = errors[name] / max(allowed, math.ulp(0.0))
            if not share <= share_of_worst:  # also true for NaN, which then stays
                worst, share_of_worst = name, share
            if math.isnan(share):
                break
        size = max(rms(self.exact[worst]), math.ulp(0.0))
        error, reference = errors[worst] / size, self.reference_errors[worst] / size
        where = "" if worst == row else f" in {worst.removeprefix(row).strip()}"
        count = f"{len(names)} compared; " if len(names) > 1 else ""
        missing = "missing, or of another shape" if math.isinf(error) else f"error {error:.1e}"
        return Check(
            row,
            share_of_worst <= 1.0,
            f"{count}{missing}{where}",
            f"at most {FACTOR * reference + ULPS * unit(self.precision):.1e}: {FACTOR:g} x the reference's own error "
            f"against float64 ({reference:.1e}, in its worst right arrangement) + {ULPS:g} ulp",
            guards,
        )


def baseline(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    precision: Precision = "float32",
    *,
    ids: Int[Tensor, "B T"] | None = None,
    document_ids: Int[Tensor, "B T"] | None = None,
) -> Baseline:
    """Run the reference with these weights, also in float64 (errors: see `reference_model`).

    Args:
        config: The architecture.
        weights: By Hugging Face's names.
        precision: The arithmetic of the reference.
        ids: Its input; by default two random sequences of `SEQUENCE` tokens.
        document_ids: The document of each token, to keep attention inside a document.
    """
    ids = sequences(config) if ids is None else ids
    reference, in_float64 = reference_model(config, weights), float64_reference(config, weights)

    def run(model: Any, attention: Attention, forward: Callable[[Callable[..., Any]], Forward]) -> Captured:
        mask = None if document_ids is None else reference_mask(document_ids, attention)
        scale = LOSS_SCALE if precision == "float16 autocast" else 1.0
        return capture(model, ids, forward(partial(model, use_cache=False, attention_mask=mask)), loss_scale=scale)

    exact = run(in_float64, "sdpa", logits_forward)
    del in_float64  # twice the size of the model
    if not precision.endswith("autocast") and document_ids is None:  # under autocast a cache would mix two types
        exact["key/value cache"] = exact["logits"]  # with or without a cache, the right answer is the same

    def arranged_run(arrangement: Arrangement) -> Captured:
        theirs = run(reference, arrangement.attention, reference_forward)
        if "key/value cache" in exact:
            theirs["key/value cache"] = reference_logits_with_cache(reference, ids)
        return theirs

    with arithmetic(precision):
        errors = reference_errors(reference, arranged_run, exact, arrangements(element_type(precision)))
    return Baseline(ids, document_ids, exact, reference, errors, precision)


def reference_errors(
    reference: Any, run: Callable[[Arrangement], Captured], exact: Captured, among: Sequence[Arrangement]
) -> dict[str, float]:
    """Return the largest error of each of the reference's results, over some right arrangements.

    Args:
        reference: transformers' model.
        run: Computes with it, in the arrangement that is set.
        exact: The results in float64.
        among: The arrangements.
    """
    errors: list[dict[str, float]] = []
    for arrangement in among:
        with arranged(reference, arrangement):
            errors.append(rms_errors(run(arrangement), exact))
    return {name: largest(error[name] for error in errors) for name in exact}


def sequences(config: ModelConfig, length: int = SEQUENCE) -> Int[Tensor, "2 T"]:
    """Return two random sequences, no longer than the context."""
    return ids_for(config.vocab_size, 2, min(length, config.max_position_embeddings))


def parity(model: CausalLM, precision: Precision = "float32", *, sequence: int = SEQUENCE) -> list[Check]:
    """Compare a model with the reference that has the same weights: every quantity that training depends on.

    Args:
        model: The model, on the CPU, in float32, or in bfloat16 for the precision of that name.
        precision: The arithmetic of both.
        sequence: T, the length of the sequences that both read.
    """
    try:
        base = baseline(model.config, model.state_dict(), precision, ids=sequences(model.config, sequence))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        return [Check("weights load", False, reason, "a strict load_state_dict", GUARDS["weights"])]
    groups = ["logits", "hidden states", "loss", "gradients"]
    with arithmetic(precision):
        ours = capture(model, base.ids, our_forward(model))
        if "key/value cache" in base.exact:
            groups.append("key/value cache")
            ours["key/value cache"] = our_logits_with_cache(model, base.ids)
    errors = rms_errors(ours, base.exact)
    checks = [base.compare(group, errors) for group in groups]
    return checks if precision != "float32" else [*checks, greedy(model, base.reference)]


def arithmetic(precision: Precision) -> Any:
    """Return the context manager in which a model computes in this precision."""
    return torch.autocast("cpu", element_type(precision)) if precision.endswith("autocast") else nullcontext()


def element_type(precision: Precision) -> torch.dtype:
    """Return the type in which products are computed."""
    return {"float32": torch.float32, "float16 autocast": torch.float16}.get(precision, torch.bfloat16)


def unit(precision: Precision) -> float:
    """Return one unit in the last place, relative to the number."""
    return torch.finfo(element_type(precision)).eps


# --- errors --------------------------------------------------------------------------------------------------


def rms(values: Tensor) -> float:
    """Return the root mean square, in float64."""
    return float(torch.linalg.vector_norm(values.detach(), dtype=torch.float64)) / math.sqrt(values.numel())


def rms_errors(found: Mapping[str, Tensor], exact: Captured) -> dict[str, float]:
    """Return the root mean square error of each result; a missing one, or one of another shape, has infinity."""
    errors: dict[str, float] = {}
    for name, right in exact.items():
        value = found.get(name)
        same_shape = value is not None and value.shape == right.shape
        errors[name] = rms(value.double() - right) if value is not None and same_shape else math.inf
    return errors


def tolerance(reference_error: float, size: float, precision: Precision) -> float:
    """Return the largest allowed error, from the reference's own and the size of the values."""
    return FACTOR * reference_error + ULPS * unit(precision) * size


@torch.no_grad()
def greedy(model: CausalLM, reference: Any) -> Check:
    """Compare our greedy continuation, generated with the cache, with the reference's."""

    def continuation(prompt: Int[Tensor, "1 T"], count: int) -> list[int]:
        sampling = SamplingParams(max_new_tokens=count, temperature=0.0)
        return list(generate(model, prompt[0].tolist(), sampling, eos_id=None))

    return greedy_check(reference, model.config, model, continuation)


@torch.no_grad()
def greedy_check(
    reference: Any,
    config: ModelConfig,
    run: Callable[[Int[Tensor, "1 T"]], Tensor],
    continuation: Callable[[Int[Tensor, "1 T"], int], list[int]] | None,
) -> Check:
    """Compare greedy continuations with the reference's `generate`, with its cache.

    Args:
        reference: transformers' model.
        config: The architecture.
        run: Returns logits without a cache; one pass over the reference's continuation gives every greedy token.
        continuation: Generates with the implementation's own cache, if it has one.
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
    if continuation is not None:
        found = {"with the cache": continuation(prompt, count)} | found
    equal = {how: sum(map(int.__eq__, tokens, right)) for how, tokens in found.items()}
    return Check(
        "greedy tokens",
        all(tokens == right for tokens in found.values()),
        ", ".join(f"{number} of {count} {how}" for how, number in equal.items()),
        "all equal to transformers' generate with its cache",
        GUARDS["greedy tokens"],
    )
