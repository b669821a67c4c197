"""Autoregressive decoding with a KV cache, of one text or of a batch.

The first token that `decode` or `decode_batch` yields for a text costs the pass over its prompt (prefill), every
further one a pass over a single token.

Logits are processed in the order of transformers: repetition penalty, temperature, top-k, top-p. Greedy decoding
applies the penalty and none of the other three.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resmol.config.model_config import ModelConfig
from resmol.errors import NonFiniteError, UsageError
from resmol.inference.sampling_params import SamplingParams
from resmol.model.kv_cache import KVCache
from resmol.model.llama import CausalLM
from resmol.system.wording import counted

FinishReason = Literal["eos", "length", "context", "stop", "interrupted"]


class DecodingState:
    """A prompt and the tokens that were generated after it.

    Args:
        config: The architecture of the model.
        prompt: Token ids; an empty prompt becomes the end-of-document token, which starts a new document.
        sampling: How to sample.
        eos_id: The token that ends the text, or several of them; None if no token does.
        with_logprobs: Whether to keep the log-probability of each token.

    Attributes:
        prompt: The token ids of the prompt.
        tokens: The generated token ids, without the token that ended the text (``eos_id``).
        logprobs: The log-probability of each generated token in nats, by the model's own distribution: log-softmax of
            the raw logits, before penalty, temperature and filters. Empty unless ``with_logprobs``.
        finish_reason: None while decoding goes on; ``eos``: the model ended the text; ``length``: ``max_new_tokens``
            was reached; ``context``: the context is full. A reader may set another one (``stop``, ``interrupted``),
            which ends decoding before the next token.

    Raises:
        UsageError: On creation: the prompt fills the model's context, or holds an id outside the vocabulary.
    """

    def __init__(
        self,
        config: ModelConfig,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        eos_id: int | Collection[int] | None,
        with_logprobs: bool = False,
    ) -> None:
        self.prompt = list(prompt) or [config.eos_token_id]
        check_prompt(config, self.prompt)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self.sampling = sampling
        self.limit = min(sampling.max_new_tokens, config.max_position_embeddings - len(self.prompt))
        self._ends = frozenset(() if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id)
        self._with_logprobs = with_logprobs
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._seen = torch.tensor(self.prompt + [0] * self.limit)  # filled in place, not allocated for each token

    def add(self, logits: Float[Tensor, " V"]) -> bool:
        """Sample the next token from the logits of the last one; return whether it was added (or ended the text)."""
        length = len(self.prompt) + len(self.tokens)
        token = sample_token(logits, self._seen[:length], self.sampling, self._generator)
        if token in self._ends:
            self.finish_reason = "eos"
            return False
        if self._with_logprobs:  # first, so that Ctrl-C in between cannot leave a token without one
            self.logprobs.append(float(logits.float().log_softmax(-1)[token]))
        self.tokens.append(token)
        self._seen[length] = token
        if len(self.tokens) == self.limit:
            self.finish_reason = "length" if self.limit == self.sampling.max_new_tokens else "context"
        return True


def check_prompt(config: ModelConfig, ids: Sequence[int]) -> None:
    """Raise `UsageError` when the ids of a prompt fill the model's context, or one is outside the vocabulary."""
    if len(ids) >= config.max_position_embeddings:
        raise UsageError(
            f"the prompt has {counted(len(ids), 'token')}; the model's context is {config.max_position_embeddings:,}",
            fix="shorten the prompt",
        )
    outside = [token for token in ids if not 0 <= token < config.vocab_size]
    if outside:
        raise UsageError(
            f"token id {outside[0]} is outside the vocabulary of {config.vocab_size}",
            fix="use the model's own tokenizer",
        )


def generate(
    model: CausalLM, prompt: Sequence[int], sampling: SamplingParams, *, eos_id: int | Collection[int] | None
) -> Iterator[int]:
    """Yield new token ids until ``eos_id`` (which is not yielded), ``max_new_tokens`` or the end of the context.

    An empty prompt starts a new document: the model reads its end-of-document token first.

    Raises:
        UsageError: The prompt fills the model's context, or holds an id outside the vocabulary.
        NonFiniteError: The model's logits are not finite.
    """
    return decode(model, DecodingState(model.config, prompt, sampling, eos_id=eos_id))


def decode(model: CausalLM, text: DecodingState) -> Iterator[int]:
    """Decode one text; yield each token after adding it."""
    weight = model.lm_head.weight
    cache = KVCache(model.config, 1, len(text.prompt) + text.limit, weight.dtype, weight.device)
    new = text.prompt
    while text.finish_reason is None and text.add(_logits(model, new, cache)):
        yield text.tokens[-1]
        new = text.tokens[-1:]


def decode_batch(model: CausalLM, rows: Sequence[DecodingState]) -> Iterator[list[DecodingState]]:
    """Decode several texts together; yield after each pass the rows that it added a token to.

    The first passes are the prefill, one for each text. Each writes the prompt right-aligned into its row of one
    cache, so all rows write their next token into the same slot, while each keeps its own positions. A row that has
    ended leaves the batch.

    Each row has its own random generator, so its tokens are those of `decode`, whatever the other rows are. A matmul
    may sum in another order for another number of rows, so logits may differ in their last bits; where two tokens are
    equally probable to that precision, the sampled one may differ too.

    Raises:
        NonFiniteError: The model's logits are not finite.
    """
    if not rows:
        return
    width = max(len(row.prompt) for row in rows)
    weight = model.lm_head.weight
    capacity = width + max(row.limit for row in rows)
    cache = KVCache(model.config, len(rows), capacity, weight.dtype, weight.device)
    for number, row in enumerate(rows):
        grew = row.add(_logits(model, row.prompt, cache.row(number, width, len(row.prompt))))
        yield [row] if grew else []
    cache.align([width - len(row.prompt) for row in rows], width)
    active = list(rows)
    while unfinished := [number for number, row in enumerate(active) if row.finish_reason is None]:
        if len(unfinished) < len(active):
            cache.keep(unfinished)
            active = [active[number] for number in unfinished]
        logits = _next_logits(model, [row.tokens[-1] for row in active], cache)
        yield [row for row, own in zip(active, logits, strict=True) if row.add(own)]


def apply_repetition_penalty(
    logits: Float[Tensor, " V"], seen: Int[Tensor, " N"], penalty: float
) -> Float[Tensor, " V"]:
    """Return the logits with those of the ``seen`` tokens made less likely (Keskar et al. 2019, section 4.1).

    A token counts once, however often it was seen. A penalty of 1 returns the logits unchanged.
    """
    if penalty == 1.0:
        return logits
    index = seen.to(logits.device)
    scores = logits[index]  # a token that was seen twice has the same score twice, and is written twice
    return logits.scatter(0, index, torch.where(scores < 0, scores * penalty, scores / penalty))


def top_k_top_p(logits: Float[Tensor, " V"], sampling: SamplingParams) -> Float[Tensor, " V"]:
    """Return the probabilities to sample from, after temperature, top-k and top-p in this order.

    The most probable token is always kept. Ties at the border of top-k are all kept, as in transformers. Of ties at
    the border of top-p as many are kept as in transformers; which of them is up to the sort, there as here.
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        threshold = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1.0:
        kept = int(probabilities.count_nonzero())  # few after top-k; sorting the whole vocabulary takes milliseconds
        ordered, order = probabilities.topk(max(1, kept))
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # the tokens before it already add up to p
        probabilities = probabilities.scatter(0, order[beyond], 0.0)
    return probabilities / probabilities.sum()


def sample_token(
    logits: Float[Tensor, " V"], seen: Int[Tensor, " N"], sampling: SamplingParams, generator: torch.Generator
) -> int:
    """Return the id of the next token.

    Args:
        logits: The raw logits of the model.
        seen: The ids of all tokens so far, including the prompt's.
        sampling: How to sample.
        generator: A generator on the CPU, so that a seed samples the same tokens on every device.

    Raises:
        NonFiniteError: The logits hold NaN or infinity.
    """
    scores = apply_repetition_penalty(logits.float(), seen, sampling.repetition_penalty)
    if not all(map(math.isfinite, torch.stack(scores.aminmax()).tolist())):  # NaN propagates through both
        raise NonFiniteError("the model's logits hold NaN or infinity", fix="check the weights; training diverged")
    if sampling.temperature == 0:
        return int(scores.argmax())
    return int(torch.multinomial(top_k_top_p(scores, sampling).cpu(), 1, generator=generator))


@torch.inference_mode()
def _logits(model: CausalLM, new: Sequence[int], cache: KVCache) -> Float[Tensor, " V"]:
    """Return the logits of the last of the ``new`` tokens of one text; no other position is needed."""
    hidden = model.hidden(torch.tensor([new], device=model.lm_head.weight.device), cache=cache)
    logits: Tensor = model.lm_head(hidden[0, -1])
    return logits


@torch.inference_mode()
def _next_logits(model: CausalLM, new: Sequence[int], cache: KVCache) -> Float[Tensor, "B V"]:
    """Return the logits of one new token for each of B texts."""
    hidden = model.hidden(torch.tensor(new, device=model.lm_head.weight.device)[:, None], cache=cache)
    logits: Tensor = model.lm_head(hidden[:, -1])
    return logits
