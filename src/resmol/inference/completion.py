"""Text completion: streamed or in batches, with stop strings, finish reasons and timings."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from resmol.data.tokenizer import StreamDecoder, Tokenizer
from resmol.errors import UsageError
from resmol.inference.generate import DecodingState, FinishReason, check_prompt, decode, decode_batch
from resmol.inference.sampling_params import SamplingParams
from resmol.inference.stop_strings import StopStrings
from resmol.model.llama import CausalLM
from resmol.system.wording import counted

FINISH_REASONS: dict[FinishReason, str] = {
    "eos": "end of the text",
    "length": "token limit",
    "context": "context full",
    "stop": "stop string",
    "interrupted": "interrupted",
}
_CHECKED_TOGETHER = 1024  # prompts that are tokenized at a time while all are checked


def untokenizable_notice(tokenizer: Tokenizer, prompt: str) -> str:
    """Return a sentence about the bytes of a prompt that have no token, which the model cannot see; "" if all have."""
    dropped = tokenizer.count_untokenizable(prompt)
    return f"left out of the prompt: {counted(dropped, 'byte')} without a token in this vocabulary" if dropped else ""


@dataclass(frozen=True)
class Timings:
    """The times of prefill and decoding, without the time that the reader spends between two pieces.

    Attributes:
        prefill_seconds: Time until each text has its first token.
        prefill_tokens: Tokens of the prompts.
        decode_seconds: Time of all further passes.
        decode_tokens: Passes over one new token each: all sampled tokens but the first of each text.
    """

    prefill_seconds: float
    prefill_tokens: int
    decode_seconds: float
    decode_tokens: int

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens per second, without the first of each text; 0 if there was no other."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else 0.0

    @classmethod
    def total(cls, parts: Sequence[Timings]) -> Timings:
        """Return the sum of consecutive timings."""
        return cls(
            sum((part.prefill_seconds for part in parts), start=0.0),
            sum(part.prefill_tokens for part in parts),
            sum((part.decode_seconds for part in parts), start=0.0),
            sum(part.decode_tokens for part in parts),
        )

    def describe(self) -> str:
        """Return both rates as a phrase."""
        prefill = f"prompt {counted(self.prefill_tokens, 'token')} in {self.prefill_seconds:.2f} s"
        rate = f", then {self.decode_tokens_per_second:,.1f} tokens/s" if self.decode_tokens else ""
        return f"{prefill}{rate}"

    def to_dict(self) -> dict[str, float]:
        """Return the fields and the two rates as a JSON object."""
        return {
            **asdict(self),
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


@dataclass(frozen=True)
class Completion:
    """A prompt and its generated text.

    Attributes:
        prompt: The text of the prompt.
        text: The generated text; it ends before a stop string.
        prompt_ids: The tokens that the model read, with those that its tokenizer adds; if there are none, the
            end-of-document token.
        token_ids: The generated tokens, including those that a stop string cut off, without the token that ended it.
        logprobs: Their log-probabilities in nats: log-softmax of the raw logits, before penalty, temperature and
            filters. Empty unless asked for.
        finish_reason: A key of `FINISH_REASONS`; see `generate.DecodingState`.
        timings: The timings of this text, or of the whole batch that it was decoded in.
    """

    prompt: str
    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    timings: Timings

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the timings as a JSON object."""
        values = asdict(self)
        del values["timings"]
        return values


class _Writer:
    """Decodes the tokens of one `DecodingState` to text, and holds back text that may still change."""

    def __init__(self, tokens: DecodingState, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.tokens = tokens
        self.text = ""
        self._decoder = StreamDecoder(tokenizer)
        self._stop = StopStrings(stop)

    def take(self, token: int) -> str:
        """Return the text that a token adds; end the continuation at a stop string."""
        return self._emit(self._decoder.push(token))

    def finish(self) -> str:
        """Return the text that was held back: half a character, or the beginning of a stop string."""
        rest, held = self._emit(self._decoder.flush()), self._stop.flush()
        self.text += held
        return rest + held

    def _emit(self, text: str) -> str:
        certain = self._stop.push(text)
        self.text += certain
        if self._stop.found:
            self.tokens.finish_reason = "stop"
        return certain


Step = TypeVar("Step")


class _Clock(Generic[Step]):
    """Iterates over decoding steps and times each, without the time between them."""

    def __init__(self, steps: Iterator[Step], *, prefills: int = 1) -> None:
        self._steps = steps
        self._prefills = prefills
        self._seconds: list[float] = []

    def __iter__(self) -> Iterator[Step]:
        while True:
            started = time.perf_counter()
            try:
                step = next(self._steps)
            except StopIteration:
                return
            finally:
                self._seconds.append(time.perf_counter() - started)
            yield step

    def timings(self, rows: Sequence[DecodingState]) -> Timings:
        """Return the timings so far; a text that ended with eos took one pass more than it has tokens."""
        passes = [len(row.tokens) + (row.finish_reason == "eos") for row in rows]
        return Timings(
            prefill_seconds=sum(self._seconds[: self._prefills], start=0.0),
            prefill_tokens=sum(len(row.prompt) for row in rows),
            decode_seconds=sum(self._seconds[self._prefills :], start=0.0),
            decode_tokens=sum(max(0, count - 1) for count in passes),
        )


def _completion(prompt: str, writer: _Writer, timings: Timings) -> Completion:
    row = writer.tokens
    reason = row.finish_reason
    assert reason is not None
    logprobs = row.logprobs[: len(row.tokens)]  # one too many, if Ctrl-C came before its token
    return Completion(prompt, writer.text, row.prompt, row.tokens, logprobs, reason, timings)


class TextStreamer:
    """The generated text as an iterator over pieces, to be read once; `completion` returns the result.

    `completion` can be called before the end as well: it returns the text so far, as ``interrupted``.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompt: The text to continue.
        sampling: How to sample.
        stop: Stop strings: the text ends before the first of them.
        ends: The tokens that end the text; None for the one of the model's configuration.
        on_token: Called with every token id, also one that completes no character.
        with_logprobs: Keep the tokens' log-probabilities for `completion`; each costs a softmax.

    Raises:
        UsageError: On creation: the prompt fills the context, or a stop string is empty.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        prompt: str,
        sampling: SamplingParams,
        *,
        stop: Sequence[str] = (),
        ends: Collection[int] | None = None,
        on_token: Callable[[int], None] = lambda _token: None,
        with_logprobs: bool = False,
    ) -> None:
        eos = model.config.eos_token_id if ends is None else ends
        (ids,) = tokenizer.encode_prompts([prompt])
        self._tokens = DecodingState(model.config, ids, sampling, eos_id=eos, with_logprobs=with_logprobs)
        self._writer = _Writer(self._tokens, tokenizer, stop)
        self._clock = _Clock(decode(model, self._tokens))
        self._prompt = prompt
        self._on_token = on_token

    def __iter__(self) -> Iterator[str]:
        for token in self._clock:
            self._on_token(token)
            if text := self._writer.take(token):
                yield text
        if text := self._writer.finish():
            yield text

    def completion(self) -> Completion:
        """Return the text so far."""
        if self._tokens.finish_reason is None:
            self._tokens.finish_reason = "interrupted"
        return _completion(self._prompt, self._writer, self._clock.timings([self._tokens]))


def complete_batches(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: SamplingParams,
    *,
    stop: Sequence[str] = (),
    ends: Collection[int] | None = None,
    batch_size: int = 8,
    names: Sequence[str] = (),
    with_logprobs: bool = False,
) -> Iterator[list[Completion]]:
    """Continue several texts in batches, each as if it were alone; yield batch by batch, in order.

    All prompts are checked before the first is read; caches and buffers exist for one batch at a time. See
    `generate.decode_batch` for the effect of rounding.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: The texts to continue.
        sampling: How to sample; each text has its own random generator with the same seed.
        stop: Stop strings.
        ends: The tokens that end a text; None for the one of the model's configuration.
        batch_size: Texts that are decoded together.
        names: Names of the prompts for error messages; by default ``prompt 1``, ``prompt 2``, ...
        with_logprobs: Keep the tokens' log-probabilities; each costs a softmax.

    Raises:
        UsageError: A prompt fills the context (the message says which), or ``batch_size`` is below 1.
        KeyboardInterrupt: Ctrl-C, after yielding the texts so far, the unfinished ones as ``interrupted``.
    """
    if batch_size < 1:
        raise UsageError(f"the batch size is {batch_size}", fix="take 1 or more")
    _check_prompts(model, tokenizer, prompts, names)
    eos = model.config.eos_token_id if ends is None else ends
    for part in _slices(len(prompts), batch_size):  # a row holds a random generator and a buffer, so only for a batch
        rows = [
            DecodingState(model.config, ids, sampling, eos_id=eos, with_logprobs=with_logprobs)
            for ids in tokenizer.encode_prompts(prompts[part])
        ]
        yield from _complete_together(model, prompts[part], [_Writer(row, tokenizer, stop) for row in rows])


def _check_prompts(model: CausalLM, tokenizer: Tokenizer, prompts: Sequence[str], names: Sequence[str]) -> None:
    """Raise `UsageError` with the name of a prompt that the model cannot read; tokenizing twice costs little."""
    for part in _slices(len(prompts), _CHECKED_TOGETHER):
        for number, ids in enumerate(tokenizer.encode_prompts(prompts[part]), start=part.start):
            try:
                check_prompt(model.config, ids or [model.config.eos_token_id])
            except UsageError as error:
                name = names[number] if names else f"prompt {number + 1}"
                raise UsageError(f"{name}: {error.what}", fix=error.fix) from None


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, count, size))


def _complete_together(
    model: CausalLM, prompts: Sequence[str], writers: Sequence[_Writer]
) -> Iterator[list[Completion]]:
    """Yield the texts of one batch; after Ctrl-C yield the texts so far, and then raise it."""
    rows = [writer.tokens for writer in writers]
    writer_of = dict(zip(map(id, rows), writers, strict=True))
    clock = _Clock(decode_batch(model, rows), prefills=len(rows))
    interrupt: KeyboardInterrupt | None = None
    try:
        for grown in clock:
            for row in grown:
                writer_of[id(row)].take(row.tokens[-1])
    except KeyboardInterrupt as error:
        interrupt = error
    for writer in writers:
        if writer.tokens.finish_reason is None:
            writer.tokens.finish_reason = "interrupted"
        else:
            writer.finish()
    timings = clock.timings(rows)
    yield [_completion(prompt, writer, timings) for prompt, writer in zip(prompts, writers, strict=True)]
    if interrupt is not None:
        raise interrupt
