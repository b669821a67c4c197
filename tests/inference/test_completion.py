"""Texts piece by piece: stop strings that span tokens, reasons, timings, and batches that say what single texts say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from resmol.config.run_config import RunConfig
from resmol.data.tokenizer import Tokenizer
from resmol.errors import UsageError
from resmol.inference import completion as module
from resmol.inference.completion import (
    FINISH_REASONS,
    TextStreamer,
    Timings,
    complete_batches,
    untokenizable_notice,
)
from resmol.inference.generate import DecodingState, FinishReason, decode_batch
from resmol.inference.sampling_params import SamplingParams
from resmol.interop.load import LoadedModel
from resmol.interop.resolve import Source
from resmol.model.llama import CausalLM

PROMPTS = ["ka lo", "", "mi ner 42", "é", "shu ver ing the"]
FREE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def loaded(tiny_config: RunConfig, tiny_tokenizer: Tokenizer) -> LoadedModel:
    model = CausalLM(tiny_config.model).eval().requires_grad_(requires_grad=False)
    model.init_weights(3)
    return LoadedModel(model, Source("huggingface", Path("model")), lambda: tiny_tokenizer)


def test_what_streams_is_the_text_of_the_tokens(loaded: LoadedModel) -> None:
    for seed in range(5):
        stream = loaded.stream("ka", SamplingParams(24, 1.0, 0, 1.0, seed))
        text = "".join(stream)
        done = stream.completion()
        assert text == done.text == loaded.tokenizer.decode(done.token_ids)
        assert text == loaded.generate("ka", seed=seed, **FREE)
        assert (done.finish_reason, len(done.token_ids)) == ("length", 24)


def test_a_stop_string_that_spans_tokens_is_never_shown(loaded: LoadedModel) -> None:
    whole = loaded.complete("ka", seed=2, **FREE)
    pieces = [loaded.tokenizer.decode([token]) for token in whole.token_ids]
    spans = 0
    for first, second in itertools.pairwise(pieces):
        stop = first[-1:] + second[:1]
        if "\ufffd" in stop or len(stop) < 2:
            continue
        spans += 1
        stream = loaded.stream("ka", SamplingParams(24, 1.0, 0, 1.0, 2), stop=[stop])
        shown = "".join(stream)
        assert shown == whole.text[: whole.text.index(stop)]
        done = stream.completion()
        assert (done.text, done.finish_reason) == (shown, "stop")
        assert done.token_ids == whole.token_ids[: len(done.token_ids)]
        assert len(done.token_ids) < 24 or whole.text.endswith(second)
    assert spans > 5


def test_a_batch_says_what_each_says_alone(loaded: LoadedModel) -> None:
    stop = ["a"]
    alone = [loaded.complete(prompt, stop=stop, seed=7, **FREE) for prompt in PROMPTS]
    for batch_size in (1, 2, 5):
        together = loaded.complete_batch(PROMPTS, stop=stop, batch_size=batch_size, seed=7, **FREE)
        for one, other in zip(alone, together, strict=True):
            ours, theirs = one.to_dict(), other.to_dict()
            assert ours.pop("logprobs") == pytest.approx(theirs.pop("logprobs"), abs=1e-4)
            assert ours == theirs
    assert "stop" in {one.finish_reason for one in alone}


def test_a_prompt_that_is_too_long_is_named_before_any_work(loaded: LoadedModel) -> None:
    batches = complete_batches(
        loaded.model, loaded.tokenizer, ["ka", "9" * 80], SamplingParams(), batch_size=1, names=["line 1", "line 4"]
    )
    with pytest.raises(UsageError, match="line 4: the prompt has 80 tokens; the model's context is 64"):
        next(batches)
    with pytest.raises(UsageError, match="prompt 2"):
        loaded.complete_batch(["ka", "9" * 80])
    with pytest.raises(UsageError, match="batch size is 0"):
        loaded.complete_batch(["ka"], batch_size=0)


def test_rows_are_made_for_one_batch_only(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds a random generator and a buffer: of a hundred thousand prompts that would be gigabytes."""
    made: list[int] = []

    class Counted(module.DecodingState):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(len(self.prompt))

    monkeypatch.setattr(module, "DecodingState", Counted)
    batches = complete_batches(loaded.model, loaded.tokenizer, PROMPTS, SamplingParams(4, 0.0), batch_size=2)
    assert made == []
    for expected in (2, 4, 5):
        next(batches)
        assert len(made) == expected
    assert list(batches) == []


def test_ctrl_c_leaves_what_there_is_of_a_batch(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = loaded.complete_batch(PROMPTS, batch_size=2, max_new_tokens=12, temperature=0.0)
    passes = itertools.count()

    def interrupted(model: CausalLM, rows: Sequence[DecodingState]) -> Iterator[list[DecodingState]]:
        for grown in decode_batch(model, rows):
            if next(passes) == 17:  # the second batch: two passes over prompts, and some over single tokens
                raise KeyboardInterrupt
            yield grown

    monkeypatch.setattr(module, "decode_batch", interrupted)
    batches = complete_batches(
        loaded.model, loaded.tokenizer, PROMPTS, SamplingParams(12, 0.0), batch_size=2, with_logprobs=True
    )
    first, second = next(batches), next(batches)
    assert [one.text for one in first] == [one.text for one in whole[:2]]
    for one, expected in zip(second, whole[2:4], strict=True):
        assert one.finish_reason == "interrupted"
        assert 0 < len(one.token_ids) == len(one.logprobs) < 12
        assert one.token_ids == expected.token_ids[: len(one.token_ids)]
    with pytest.raises(KeyboardInterrupt):
        next(batches)


def test_ctrl_c_between_a_token_and_its_logprob(loaded: LoadedModel) -> None:
    stream = loaded.stream("ka", SamplingParams(24, 0.0), with_logprobs=True)
    next(iter(stream))
    stream._tokens.logprobs.append(-1.0)  # what an interrupt leaves there
    done = stream.completion()
    assert len(done.token_ids) == len(done.logprobs)


def test_who_stops_reading_gets_what_there_is(loaded: LoadedModel) -> None:
    seen: list[int] = []
    stream = loaded.stream("ka", SamplingParams(24, 0.0), on_token=seen.append, with_logprobs=True)
    next(iter(stream))
    done = stream.completion()
    assert done.finish_reason == "interrupted"
    assert done.token_ids == seen
    assert len(done.logprobs) == len(seen)
    assert loaded.stream("ka", SamplingParams(2, 0.0)).completion().logprobs == []


def test_prefill_and_decoding_are_timed_apart_and_the_reader_is_not(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that goes a second further whenever somebody looks: each pass takes one, whatever the reader does."""
    ticks = itertools.count()
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))
    stream = loaded.stream("ka lo", SamplingParams(6, 0.0))
    for _ in stream:
        for _ in range(1000):
            next(ticks)
    timings = stream.completion().timings
    prompt = len(loaded.tokenizer.encode("ka lo"))
    assert (timings.prefill_seconds, timings.prefill_tokens, timings.decode_tokens) == (1.0, prompt, 5)
    assert timings.decode_seconds == 6.0  # the end is noticed in a step of its own
    assert timings.prefill_tokens_per_second == prompt
    batch = loaded.complete_batch(["ka", "ka lo", "lo"], max_new_tokens=4, temperature=0.0)[0].timings
    assert (batch.prefill_seconds, batch.decode_tokens) == (3.0, 9)


def test_timings_add_up_and_nothing_divides_by_zero() -> None:
    total = Timings.total([Timings(1.0, 10, 2.0, 30), Timings(0.5, 5, 1.0, 30)])
    assert (total.prefill_tokens_per_second, total.decode_tokens_per_second) == (10.0, 20.0)
    empty = Timings(0.0, 0, 0.0, 0)
    assert all(math.isfinite(value) for value in empty.to_dict().values())
    assert empty.describe()


def test_every_finish_reason_has_words() -> None:
    assert set(FINISH_REASONS) == set(get_args(FinishReason))


def test_bytes_without_a_token_are_counted_in_a_notice(genuine_tokenizer: Tokenizer) -> None:
    assert untokenizable_notice(genuine_tokenizer, "plain text") == ""
    notice = untokenizable_notice(genuine_tokenizer, "a\x04b\x04")
    assert notice.startswith("left out of the prompt: 2 bytes without a token")


def test_an_empty_stop_string_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(UsageError, match="stop string is empty"):
        TextStreamer(loaded.model, loaded.tokenizer, "ka", SamplingParams(), stop=[""])
