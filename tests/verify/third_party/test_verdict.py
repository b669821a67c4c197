"""The verdict on mistakes found in other people's code: what passes, what fails, and in which words.

Each mistake was found in a public implementation, and is put into a plain model written for this test.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from plain_model import PlainModel, WithLabels, WithTargets
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from resmol.checks import Check, all_passed
from resmol.config.load import load_preset
from resmol.config.model_config import ModelConfig
from resmol.model.llama import CausalLM
from resmol.verify import verify_third_party
from resmol.verify.third_party.diagnose import Diagnosis
from resmol.verify.third_party.factory import Factory
from resmol.verify.third_party.localize import localized_diagnosis
from resmol.verify.third_party.third_party_model import build_third_party
from resmol.verify.tiny_models import fill

pytestmark = pytest.mark.usefixtures("computed_once")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """Four blocks, since some mistakes are in every fourth one; positions above 256."""
    small = {"vocab_size": 128, "max_position_embeddings": 384, "bos_token_id": 0, "eos_token_id": 0}
    return load_preset("nano").model.model_copy(update=small)


def in_transformers(model: type, kind: type, **options: Any) -> Factory:
    def build(config: ModelConfig) -> nn.Module:
        return model(kind(**{**config.to_hf(), "head_dim": config.head_dim, **options}))

    return build


def full_attention(config: ModelConfig) -> nn.Module:
    """Return a model with a key/value head for each query head, and without its final norm."""
    model = PlainModel(config.model_copy(update={"num_key_value_heads": config.num_attention_heads}))
    del model.norm
    return model


def judged(factory: Factory, config: ModelConfig) -> tuple[set[str], Check]:
    *rows, verdict = verify_third_party(factory, config)
    assert verdict.name == "verdict"
    assert verdict.passed == all_passed(rows)
    return {row.name for row in rows if not row.passed}, verdict


@pytest.mark.parametrize(
    "factory",
    [
        PlainModel,  # its norm loses a bit in pure bfloat16, which is a note
        WithLabels,
        partial(WithTargets, shift=0),
        partial(PlainModel, std=0.06),
        in_transformers(LlamaForCausalLM, LlamaConfig, attn_implementation="eager"),
    ],
    ids=["plain norm", "labels", "targets that come shifted", "another deviation", "transformers, eager"],
)
def test_what_is_right_passes(factory: Factory, config: ModelConfig) -> None:
    failed, verdict = judged(factory, config)
    assert not failed
    assert verdict.measured == "your architecture is SmolLM2's"


def test_a_norm_that_loses_a_bit_in_bfloat16_is_a_note(config: ModelConfig) -> None:
    rows = {row.name: row for row in verify_third_party(PlainModel, config)}
    assert rows["norm in bfloat16"].passed
    assert "add .float()" in rows["norm in bfloat16"].measured


@pytest.mark.parametrize(
    ("factory", "row", "words", "fix"),
    [
        (partial(PlainModel, longest=300), "context", "192 positions run, 384 do not", "all 384"),
        (partial(WithLabels, shift=2), "loss from labels", "labels are shifted twice", "cross_entropy"),
        (partial(WithTargets, shift=2), "loss from labels", "labels are shifted twice", "cross_entropy"),
        (partial(WithLabels, shift=0), "loss from labels", "labels are never shifted", "cross_entropy"),
        (partial(PlainModel, std=0), "first loss", "initial weights are wrong: standard deviation: embed", "normal_"),
        (partial(PlainModel, dropout=0.1), "training mode", "layers.0.dropout (p = 0.1)", "leave out dropout"),
        (partial(PlainModel, tied=False), "tying", "the output layer is not tied to the embeddings", "embed_tokens"),
        (partial(PlainModel, bias=True), "parameters", "it has 12 biases that SmolLM2 does not have", "bias=False"),
        (in_transformers(Qwen2ForCausalLM, Qwen2Config), "parameters", "it has 12 biases", "bias=False"),
        (in_transformers(Qwen3ForCausalLM, Qwen3Config), "logits", "in each head, as in Qwen3", "norms of q"),
        (partial(PlainModel, mask=False), "causality", "there is no causal mask", "lower triangular"),
        (full_attention, "names and shapes", "is not SmolLM2's: layers.0.self_attn.k_proj.weight has shape", "--names"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_what_is_wrong_is_named_in_one_sentence(
    factory: Factory, row: str, words: str, fix: str, config: ModelConfig
) -> None:
    failed, verdict = judged(factory, config)
    assert row in failed, failed
    assert not verdict.passed
    assert words in verdict.measured
    assert fix in verdict.expected
    assert ("diagnosis" in failed) == ("logits" in failed)


def test_targets_that_are_shifted_inside_pass_with_a_note(config: ModelConfig) -> None:
    rows = {row.name: row for row in verify_third_party(WithTargets, config)}
    assert rows["loss from labels"].passed
    assert "give it the ids as they are" in rows["loss from labels"].measured


# --- the diagnosis -------------------------------------------------------------------------------------------


def diagnosed(factory: Factory, config: ModelConfig) -> Diagnosis:
    weights = fill(CausalLM(config), seed=8)
    module = build_third_party(factory, config)
    module.load(weights.state_dict())
    found = localized_diagnosis(factory, None, module, weights)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"interleaved": "with split tables"}, ["positions are not rotated: interleaved pairs"]),
        ({"interleaved": "consistently", "theta": 10_000.0}, ["rotary pairs are (2i, 2i + 1)", "theta is 10000"]),
        ({"theta": 10_000.0}, ["theta is 10000"]),
        ({"rotation": False, "mask": False}, ["positions are never applied", "there is no causal mask"]),
        ({"over_heads": True}, ["the rotation runs over the heads"]),
        ({"over_heads": True, "interleaved": "with split tables"}, ["over the heads", "interleaved pairs"]),
        ({"mask": False, "theta": 10_000.0, "outside": True}, ["no causal mask", "theta is 10000", "outside the root"]),
        ({"tables": torch.bfloat16}, ["the tables of cosines and sines are rounded to bfloat16"]),
        ({"skip_fourth": True}, ["every fourth block is not rotated"]),
        ({"scale": False}, ["attention is not scaled"]),
        ({"eps": 1e-6}, ["the norm's epsilon is 1e-06"]),
        ({"window": 100}, ["attention sees the last 100 tokens only"]),
    ],
    ids=str,
)
def test_the_diagnosis_names_exactly_the_mistakes(
    options: dict[str, Any], words: list[str], config: ModelConfig
) -> None:
    found = diagnosed(partial(PlainModel, **options), config)
    assert found.sure, found
    assert len(found.bugs) == len(words), found
    assert all(word in found.what for word in words), found


def test_scaled_frequencies_are_named(config: ModelConfig) -> None:
    scaling = {"rope_type": "llama3", "rope_theta": config.rope_theta, "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    found = diagnosed(in_transformers(LlamaForCausalLM, LlamaConfig, rope_parameters=scaling, rope_theta=None), config)
    assert found.sure
    assert found.what == "rotation frequencies are scaled as in Llama 3.1 (factor 8)"


def test_nothing_innocent_is_accused(config: ModelConfig) -> None:
    """Where no known bug explains the difference, none is named; what changes nothing here is no suspect."""

    class Odd(PlainModel):
        def logits(self, ids: torch.Tensor) -> torch.Tensor:
            return super().logits(ids.flip(0)) + 0.1 * torch.sin(super().logits(ids))

    found = diagnosed(Odd, config)
    assert not found.bugs
    assert "none of the known bugs" in str(found)


def test_a_factory_of_one_size_is_diagnosed_at_the_first_block_that_differs(config: ModelConfig) -> None:
    found = diagnosed(PlainModel(config, interleaved="with split tables"), config)
    assert found.sure
    assert "interleaved pairs" in found.what
    assert "norm of q changes by up to" in found.evidence
