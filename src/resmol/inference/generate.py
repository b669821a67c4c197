"""One token after the other, with a cache of keys and values: one text, or several at once.

The first token that a `decode` or a `decode_batch` yields for a text costs the pass over its prompt (prefill), every
further one a pass over one token; who wants to time the two apart looks at the clock around the first.

Logits become a choice in the order of transformers: repetition penalty, temperature, top-k, top-p. The penalty also
counts for greedy decoding; the other three do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resmol.config.model_config import ModelConfig
from resmol.errors import NonFiniteError, UsageError
from resmol.inference.sampling_params import SamplingParams
from resmol.model.kv_cache import KVCache
from resmol.model.llama import CausalLM

__all__ = [
    "DecodingState",
    "FinishReason",
    "SamplingParams",
    "apply_repetition_penalty",
    "check_prompt",
    "choose",
    "decode",
    "decode_batch",
    "generate",
    "generate_batch",
    "top_k_top_p",
]

FinishReason = Literal["eos", "length", "context", "stop", "interrupted"]


class DecodingState:
    """A prompt and the tokens that were added to it.

    Attributes:
        prompt: Its token ids; an empty prompt becomes the end-of-document token, so that a new document begins.
        tokens: What was added; the token that ended the text (``eos_id``) is not among them.
        logprobs: For each of the tokens, its log-probability in nats by the model's own distribution: log-softmax
            of the raw logits, before penalty, temperature and filters. Empty unless asked for.
        finish_reason: None while it goes on; ``eos``: the model ended the text; ``length``: ``max_new_tokens``;
            ``context``: the model sees no further. Whoever reads along may set another (``stop``, ``interrupted``),
            which ends it before the next token.

    Raises:
        UsageError: On creation: the prompt fills the model's context, or holds an id outside the vocabulary.
    """

    def __init__(
        self,
        config: ModelConfig,
        prompt: Sequence[int],
        sampling: SamplingParams,
        *,
        eos_id: int | None,
        with_logprobs: bool = False,
    ) -> None:
        self.prompt = list(prompt) or [config.eos_token_id]
        check_prompt(config, self.prompt)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self.sampling = sampling
        self.room = config.max_position_embeddings - len(self.prompt)
        self._eos_id = eos_id
        self._with_logprobs = with_logprobs
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._seen = torch.tensor(self.prompt + [0] * self.limit)  # filled as it goes, not made anew for each token

    @property
    def limit(self) -> int:
        """The most tokens that can be added."""
        return min(self.sampling.max_new_tokens, self.room)

    def add(self, logits: Float[Tensor, " V"]) -> bool:
        """Choose the next token by the logits behind the last one; tell whether there is one (or the text ended)."""
        length = len(self.prompt) + len(self.tokens)
        token = choose(logits, self._seen[:length], self.sampling, self._generator)
        if token == self._eos_id:
            self.finish_reason = "eos"
            return False
        if self._with_logprobs:  # before the token: Ctrl-C in between must not leave a token without one
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
            f"the prompt has {len(ids)} tokens; the model's context is {config.max_position_embeddings}",
            fix="shorten the prompt",
        )
    outside = [token for token in ids if not 0 <= token < config.vocab_size]
    if outside:
        raise UsageError(
            f"token id {outside[0]} is outside the vocabulary of {config.vocab_size}",
            fix="use the model's own tokenizer",
        )


def generate(model: CausalLM, prompt: Sequence[int], sampling: SamplingParams, *, eos_id: int | None) -> Iterator[int]:
    """Yield new token ids until ``eos_id`` (which is not yielded), the limit, or the end of the context.

    An empty prompt starts a new document: the model sees its end-of-document token first.

    Raises:
        UsageError: The prompt fills the model's context, or holds an id outside the vocabulary.
        NonFiniteError: The model's logits are not finite.
    """
    return decode(model, DecodingState(model.config, prompt, sampling, eos_id=eos_id))


def generate_batch(
    model: CausalLM, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, eos_id: int | None
) -> list[list[int]]:
    """Return the new token ids for each prompt, decoded together.

    Each row draws with its own random generator, which begins at ``sampling.seed``: its tokens are those of `generate`
    with the same seed, whatever its neighbours are. The sums of a product may be ordered otherwise for another
    number of rows, so logits may differ in their last bits from those of `generate`, and where two tokens are as
    probable as each other to that precision, so may the choice.

    Raises:
        UsageError: A prompt fills the model's context, or holds an id outside the vocabulary.
        NonFiniteError: The model's logits are not finite.
    """
    rows = [DecodingState(model.config, prompt, sampling, eos_id=eos_id) for prompt in prompts]
    for _ in decode_batch(model, rows):
        pass
    return [row.tokens for row in rows]


def decode(model: CausalLM, text: DecodingState) -> Iterator[int]:
    """Continue one text; yield each token as it is added to it."""
    weight = model.lm_head.weight
    cache = KVCache(model.config, 1, len(text.prompt) + text.limit, weight.dtype, weight.device)
    new = text.prompt
    while text.finish_reason is None and text.add(_logits(model, new, cache)):
        yield text.tokens[-1]
        new = text.tokens[-1:]


def decode_batch(model: CausalLM, rows: Sequence[DecodingState]) -> Iterator[list[DecodingState]]:
    """Continue several texts together; yield after each pass those that got a token in it.

    The first passes, one for each text, are those over the prompts.

    Prompts are read one by one, each by a pass of its own into its row of one cache, right-aligned: so all rows write
    their next token at the same place, and each keeps its own positions. A row that ended leaves the batch.
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
    while going_on := [number for number, row in enumerate(active) if row.finish_reason is None]:
        if len(going_on) < len(active):
            cache.keep(going_on)
            active = [active[number] for number in going_on]
        logits = _next_logits(model, [row.tokens[-1] for row in active], cache)
        yield [row for row, behind in zip(active, logits, strict=True) if row.add(behind)]


def apply_repetition_penalty(
    logits: Float[Tensor, " V"], seen: Int[Tensor, " N"], penalty: float
) -> Float[Tensor, " V"]:
    """Return the logits with those of the ``seen`` tokens made less likely (Keskar et al. 2019, section 4.1).

    A token counts once, however often it was seen. A penalty of 1 returns the logits as they are.
    """
    if penalty == 1.0:
        return logits
    index = seen.to(logits.device)
    scores = logits[index]  # a token that was seen twice has the same score twice, and is written twice
    return logits.scatter(0, index, torch.where(scores < 0, scores * penalty, scores / penalty))


def top_k_top_p(logits: Float[Tensor, " V"], sampling: SamplingParams) -> Float[Tensor, " V"]:
    """Return the distribution to draw from: temperature, then top-k, then top-p.

    The most probable token is always kept. Ties at the border of top-k are all kept, as in transformers. Of ties at
    the border of top-p as many are kept as there; which of them, neither sort promises.
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        threshold = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1.0:
        kept = int(probabilities.count_nonzero())  # after top-k these are few, and sorting all would take milliseconds
        ordered, order = probabilities.topk(max(1, kept))
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # the mass before a token already reaches p
        probabilities = probabilities.scatter(0, order[beyond], 0.0)
    return probabilities / probabilities.sum()


def choose(
    logits: Float[Tensor, " V"], seen: Int[Tensor, " N"], sampling: SamplingParams, generator: torch.Generator
) -> int:
    """Return the id of the next token.

    Args:
        logits: Of the model, as they are.
        seen: The ids of all tokens so far, those of the prompt included.
        sampling: How to choose.
        generator: On the CPU, so that the same seed draws the same tokens whatever the model computes on.

    Raises:
        NonFiniteError: The model gave NaN or infinity; nothing can be chosen then.
    """
    scores = apply_repetition_penalty(logits.float(), seen, sampling.repetition_penalty)
    if not all(map(math.isfinite, torch.stack(scores.aminmax()).tolist())):  # NaN is passed on by both
        raise NonFiniteError("the model's logits hold NaN or infinity", fix="check the weights; training diverged")
    if sampling.temperature == 0:
        return int(scores.argmax())
    return int(torch.multinomial(top_k_top_p(scores, sampling).cpu(), 1, generator=generator))


@torch.inference_mode()
def _logits(model: CausalLM, new: Sequence[int], cache: KVCache) -> Float[Tensor, " V"]:
    """Return the logits behind the last of the ``new`` tokens of one text; no other position is needed."""
    hidden = model.hidden(torch.tensor([new], device=model.lm_head.weight.device), cache=cache)
    logits: Tensor = model.lm_head(hidden[0, -1])
    return logits


@torch.inference_mode()
def _next_logits(model: CausalLM, new: Sequence[int], cache: KVCache) -> Float[Tensor, "B V"]:
    """Return the logits behind one new token for each of B texts."""
    hidden = model.hidden(torch.tensor(new, device=model.lm_head.weight.device)[:, None], cache=cache)
    logits: Tensor = model.lm_head(hidden[:, -1])
    return logits
