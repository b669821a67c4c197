"""Sampling: greedy equals transformers', the filters equal transformers' filters, limits hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from resmol.config import RunConfig
from resmol.errors import UsageError
from resmol.generate import Sampling, filtered_probabilities, generate
from resmol.model import CausalLM


@pytest.fixture(scope="module")
def model(tiny_config: RunConfig) -> CausalLM:
    model = CausalLM(tiny_config.model)
    model.initialise(3)
    return model


def test_greedy_equals_transformers(model: CausalLM) -> None:
    reference = LlamaForCausalLM(LlamaConfig(**model.config.to_hf()))
    reference.load_state_dict(model.state_dict(), strict=True)
    reference.generation_config.eos_token_id = None
    prompt = [5, 9, 200, 31]
    theirs = reference.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=0)
    ours = list(generate(model, prompt, Sampling(max_new_tokens=30, temperature=0.0), eos_id=None))
    assert ours == theirs[0, len(prompt) :].tolist()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 1.0),
)
def test_filters_equal_transformers(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    ours = filtered_probabilities(logits, Sampling(1, temperature, top_k, top_p))
    theirs = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    torch.testing.assert_close(ours, theirs.softmax(-1)[0], atol=1e-6, rtol=1e-4)


def test_the_seed_decides_and_global_state_does_not(model: CausalLM) -> None:
    before = torch.get_rng_state()
    first = list(generate(model, [7], Sampling(20, 1.0, 0, 1.0, seed=5), eos_id=None))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert list(generate(model, [7], Sampling(20, 1.0, 0, 1.0, seed=5), eos_id=None)) == first
    assert list(generate(model, [7], Sampling(20, 1.0, 0, 1.0, seed=6), eos_id=None)) != first


def test_ends_at_eos_even_though_its_id_is_zero(model: CausalLM) -> None:
    greedy = Sampling(30, temperature=0.0)
    free = list(generate(model, [5, 9], greedy, eos_id=None))
    assert list(generate(model, [5, 9], greedy, eos_id=free[4])) == free[: free.index(free[4])]


def test_ends_with_the_context(model: CausalLM) -> None:
    ids = list(generate(model, [1] * 60, Sampling(100, temperature=0.0), eos_id=None))
    assert len(ids) == 4
    with pytest.raises(UsageError, match="context is 64"):
        next(generate(model, [1] * 64, Sampling(), eos_id=None))


def test_an_empty_prompt_starts_a_document(model: CausalLM) -> None:
    greedy = Sampling(5, temperature=0.0)
    assert list(generate(model, [], greedy, eos_id=None)) == list(generate(model, [0], greedy, eos_id=None))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"max_new_tokens": 0},
    ],
)
def test_senseless_options(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_ids_outside_the_vocabulary(model: CausalLM) -> None:
    with pytest.raises(UsageError, match="outside the vocabulary"):
        next(generate(model, [512], Sampling(), eos_id=None))
