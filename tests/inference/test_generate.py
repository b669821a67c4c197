"""Sampling: greedy equals transformers', the filters equal transformers' filters, limits hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from resmol.config.run_config import RunConfig
from resmol.errors import NonFiniteError, UsageError
from resmol.inference.generate import (
    DecodingState,
    apply_repetition_penalty,
    decode,
    decode_batch,
    generate,
    sample_token,
    top_k_top_p,
)
from resmol.inference.sampling_params import SamplingParams
from resmol.model.llama import CausalLM


@pytest.fixture(scope="module")
def model(tiny_config: RunConfig) -> CausalLM:
    model = CausalLM(tiny_config.model)
    model.init_weights(3)
    return model


@pytest.fixture(scope="module")
def reference(model: CausalLM) -> LlamaForCausalLM:
    twin = LlamaForCausalLM(LlamaConfig(**model.config.to_hf()))
    twin.load_state_dict(model.state_dict(), strict=True)
    twin.generation_config.eos_token_id = None
    return twin.eval()


def continued(reference: LlamaForCausalLM, prompt: list[int], count: int, **options: object) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = reference.generate(ids, attention_mask=mask, max_new_tokens=count, pad_token_id=0, **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
def test_greedy_equals_transformers(model: CausalLM, reference: LlamaForCausalLM, penalty: float) -> None:
    prompt = [5, 9, 200, 31]
    theirs = continued(reference, prompt, 30, do_sample=False, repetition_penalty=penalty)
    greedy = SamplingParams(max_new_tokens=30, temperature=0.0, repetition_penalty=penalty)
    assert list(generate(model, prompt, greedy, eos_id=None)) == theirs


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.6, "repetition_penalty": 1.4},
    ],
)
def test_with_the_same_noise_the_draws_are_those_of_transformers(
    model: CausalLM, reference: LlamaForCausalLM, options: dict[str, float]
) -> None:
    prompt = [5, 9, 200, 31]
    for seed in range(4):
        ours = list(generate(model, prompt, SamplingParams(40, seed=seed, **options), eos_id=None))  # type: ignore[arg-type]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            assert ours == continued(reference, prompt, 40, do_sample=True, **options)


@examples(40)
@given(seed=st.integers(0, 10_000), penalty=st.floats(0.05, 20.0), seen=st.lists(st.integers(0, 31), min_size=1))
def test_the_penalty_equals_transformers(seed: int, penalty: float, seen: list[int]) -> None:
    logits = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits[None].clone())[0]
    assert torch.equal(apply_repetition_penalty(logits, torch.tensor(seen), penalty), theirs)


@examples(60)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 1.0),
)
def test_filters_equal_transformers(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    ours = top_k_top_p(logits, SamplingParams(1, temperature, top_k, top_p))
    theirs = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    torch.testing.assert_close(ours, theirs.softmax(-1)[0], atol=1e-6, rtol=1e-4)


@examples(40)
@given(seed=st.integers(0, 10_000), top_p=st.floats(0.05, 0.99), top_k=st.integers(0, 40))
def test_of_ties_as_many_are_kept_as_by_transformers(seed: int, top_p: float, top_k: int) -> None:
    """Which of them is left to the sort, there as here; so the kept logits are compared, not their places."""
    logits = torch.randint(0, 6, (48,), generator=torch.Generator().manual_seed(seed)).float()
    kept = top_k_top_p(logits, SamplingParams(1, 1.0, top_k, top_p)) > 0
    theirs = TopKLogitsWarper(top_k)(None, logits[None]) if top_k else logits[None]
    theirs = TopPLogitsWarper(top_p)(None, theirs)[0].isfinite()
    assert logits[kept].sort().values.tolist() == logits[theirs].sort().values.tolist()


def test_the_seed_decides_and_global_state_does_not(model: CausalLM) -> None:
    before = torch.get_rng_state()
    first = list(generate(model, [7], SamplingParams(20, 1.0, 0, 1.0, seed=5), eos_id=None))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert list(generate(model, [7], SamplingParams(20, 1.0, 0, 1.0, seed=5), eos_id=None)) == first
    assert list(generate(model, [7], SamplingParams(20, 1.0, 0, 1.0, seed=6), eos_id=None)) != first


def test_ends_at_eos_even_though_its_id_is_zero(model: CausalLM) -> None:
    greedy = SamplingParams(30, temperature=0.0)
    free = list(generate(model, [5, 9], greedy, eos_id=None))
    assert list(generate(model, [5, 9], greedy, eos_id=free[4])) == free[: free.index(free[4])]


def test_ends_with_the_context(model: CausalLM) -> None:
    ids = list(generate(model, [1] * 60, SamplingParams(100, temperature=0.0), eos_id=None))
    assert len(ids) == 4
    with pytest.raises(UsageError, match="context is 64"):
        next(generate(model, [1] * 64, SamplingParams(), eos_id=None))


def test_an_empty_prompt_starts_a_document(model: CausalLM) -> None:
    greedy = SamplingParams(5, temperature=0.0)
    assert list(generate(model, [], greedy, eos_id=None)) == list(generate(model, [0], greedy, eos_id=None))


def generate_batch(
    model: CausalLM, prompts: list[list[int]], sampling: SamplingParams, *, eos_id: int | None
) -> list[list[int]]:
    rows = [DecodingState(model.config, prompt, sampling, eos_id=eos_id) for prompt in prompts]
    for _ in decode_batch(model, rows):
        pass
    return [row.tokens for row in rows]


PROMPTS = [[5, 9, 200, 31], [7], [], [300, 2, 2, 451, 17, 80, 9, 33, 12], [5, 9]]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_of_a_batch_are_those_of_each_alone_and_of_transformers(
    model: CausalLM, reference: LlamaForCausalLM, penalty: float
) -> None:
    greedy = SamplingParams(max_new_tokens=40, temperature=0.0, repetition_penalty=penalty)
    together = generate_batch(model, PROMPTS, greedy, eos_id=None)
    assert together == [list(generate(model, prompt, greedy, eos_id=None)) for prompt in PROMPTS]
    assert together == [
        continued(reference, prompt or [0], 40, do_sample=False, repetition_penalty=penalty) for prompt in PROMPTS
    ]


def test_a_row_draws_what_it_would_draw_alone(model: CausalLM) -> None:
    sampling = SamplingParams(max_new_tokens=25, temperature=1.2, top_k=40, seed=11)
    together = generate_batch(model, PROMPTS, sampling, eos_id=None)
    assert together == [list(generate(model, prompt, sampling, eos_id=None)) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in together}) == len(PROMPTS)
    assert generate_batch(model, PROMPTS[::-1], sampling, eos_id=None) == together[::-1]


def test_rows_of_a_batch_end_each_for_itself(model: CausalLM) -> None:
    greedy = SamplingParams(max_new_tokens=20, temperature=0.0)
    alone = [list(generate(model, prompt, greedy, eos_id=None)) for prompt in PROMPTS]
    eos = alone[0][7]
    prompts = [*PROMPTS, [1] * 60, alone[0][:3]]
    expected = [list(generate(model, prompt, greedy, eos_id=eos)) for prompt in prompts]
    assert generate_batch(model, prompts, greedy, eos_id=eos) == expected
    assert len({len(tokens) for tokens in expected}) > 2
    assert len(expected[-2]) <= 4  # the context is full
    assert generate_batch(model, [], greedy, eos_id=eos) == []


@torch.no_grad()
def test_logits_of_a_ragged_batch_are_those_of_whole_texts_without_a_cache(model: CausalLM) -> None:
    """Each row has its own positions: a rotation by the wrong one changes the logprobs long before a greedy token."""
    rows = [
        DecodingState(model.config, prompt, SamplingParams(30, 1.0, 0, 1.0, seed=4), eos_id=None, with_logprobs=True)
        for prompt in PROMPTS
    ]
    for _ in decode_batch(model, rows):
        pass
    for row in rows:
        whole = model(torch.tensor([row.prompt + row.tokens]))[0].log_softmax(-1)
        behind = whole[len(row.prompt) - 1 : -1].gather(1, torch.tensor(row.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row.logprobs), behind, atol=2e-4, rtol=1e-4)


def test_logprobs_are_those_of_the_model_whatever_the_sampling(model: CausalLM, reference: LlamaForCausalLM) -> None:
    text = DecodingState(model.config, [5, 9], SamplingParams(12, 0.3, 5, 0.7, 1, 1.8), eos_id=None, with_logprobs=True)
    list(decode(model, text))
    with torch.no_grad():
        logits = reference(torch.tensor([text.prompt + text.tokens])).logits[0, 1:-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(text.tokens), reduction="none")
    torch.testing.assert_close(torch.tensor(text.logprobs), -expected, atol=2e-4, rtol=1e-4)


def test_why_a_text_ended(model: CausalLM) -> None:
    def reason(prompt: list[int], count: int, eos: int | None) -> str | None:
        text = DecodingState(model.config, prompt, SamplingParams(count, 0.0), eos_id=eos)
        list(decode(model, text))
        return text.finish_reason

    third = list(generate(model, [5, 9], SamplingParams(3, 0.0), eos_id=None))[2]
    assert reason([5, 9], 9, third) == "eos"
    assert reason([5, 9], 2, None) == "length"
    assert reason([1] * 60, 9, None) == "context"
    assert reason([1] * 60, 4, None) == "length"


def test_a_reader_can_end_a_row_of_a_batch(model: CausalLM) -> None:
    rows = [DecodingState(model.config, prompt, SamplingParams(9, 0.0), eos_id=None) for prompt in PROMPTS[:3]]
    for grown in decode_batch(model, rows):
        if rows[1] in grown and len(rows[1].tokens) == 4:
            rows[1].finish_reason = "stop"
    assert [len(row.tokens) for row in rows] == [9, 4, 9]


def test_logits_that_are_not_finite_are_an_error() -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        logits = torch.tensor([0.0, value])
        for temperature in (0.0, 1.0):
            with pytest.raises(NonFiniteError):
                sample_token(logits, torch.tensor([0]), SamplingParams(temperature=temperature), torch.Generator())


def test_ids_outside_the_vocabulary(model: CausalLM) -> None:
    with pytest.raises(UsageError, match="outside the vocabulary"):
        next(generate(model, [512], SamplingParams(), eos_id=None))
