"""Sampling: one token after the other, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from resmol.errors import UsageError
from resmol.kv_cache import KVCache
from resmol.model import CausalLM


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    Attributes:
        max_new_tokens: Stop after so many.
        temperature: Divides the logits; 0 always takes the most probable token.
        top_k: Keep the k most probable tokens; 0 keeps all.
        top_p: Keep the most probable tokens whose probabilities add up to p (Holtzman et al. 2020); 1 keeps all.
        seed: The same seed gives the same text; the generator is this call's own, training's is not touched.
    """

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            (self.max_new_tokens < 1, f"max_new_tokens is {self.max_new_tokens}; it must be at least 1"),
            (
                not 0 <= self.temperature < float("inf"),
                f"temperature is {self.temperature}; it must be 0 or more",
            ),
            (self.top_k < 0, f"top_k is {self.top_k}; it must be 0 (off) or more"),
            (not 0 < self.top_p <= 1, f"top_p is {self.top_p}; it must lie in (0, 1]"),
        ]
        found = [text for wrong, text in problems if wrong]
        if found:
            raise UsageError("; ".join(found), fix="correct the sampling options")


def filtered_probabilities(logits: Float[Tensor, " V"], sampling: Sampling) -> Float[Tensor, " V"]:
    """Return the distribution to draw from: temperature, then top-k, then top-p.

    The most probable token is always kept. Ties at the border of top-k are all kept, as in transformers.
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        threshold = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # the mass before a token already reaches p
        probabilities = probabilities.scatter(0, order[beyond], 0.0)
    return probabilities / probabilities.sum()


def generate(model: CausalLM, prompt: Sequence[int], sampling: Sampling, *, eos_id: int | None) -> Iterator[int]:
    """Yield new token ids until ``eos_id`` (which is not yielded), the limit, or the end of the context.

    An empty prompt starts a new document: the model sees its end-of-document token first.

    Raises:
        UsageError: The prompt fills the model's context, or holds an id outside the vocabulary.
    """
    config = model.config
    ids = list(prompt) or [config.eos_token_id]
    _check_prompt(ids, config.vocab_size, config.max_position_embeddings)
    count = min(sampling.max_new_tokens, config.max_position_embeddings - len(ids))
    weight = model.lm_head.weight
    cache = KVCache(config, 1, len(ids) + count, weight.dtype, weight.device)
    generator = torch.Generator().manual_seed(sampling.seed)
    new = ids
    for _ in range(count):
        token = _next_token(model, new, cache, sampling, generator)
        if token == eos_id:
            return
        yield token
        new = [token]


@torch.inference_mode()
def _next_token(
    model: CausalLM, new: Sequence[int], cache: KVCache, sampling: Sampling, generator: torch.Generator
) -> int:
    hidden = model.hidden(torch.tensor([new], device=model.lm_head.weight.device), cache=cache)
    logits = model.lm_head(hidden[0, -1])  # only the last position is needed
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = filtered_probabilities(logits, sampling).cpu()
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _check_prompt(ids: Sequence[int], vocab_size: int, context: int) -> None:
    if len(ids) >= context:
        raise UsageError(
            f"the prompt has {len(ids)} tokens; the model's context is {context}", fix="shorten the prompt"
        )
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise UsageError(
            f"token id {outside[0]} is outside the vocabulary of {vocab_size}",
            fix="use the model's own tokenizer",
        )
