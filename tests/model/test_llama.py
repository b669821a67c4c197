"""The architecture: properties that hold by themselves, and equality with transformers on tiny models."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from transformers import LlamaConfig, LlamaForCausalLM

from resmol.config.model_config import ModelConfig
from resmol.config.run_config import RunConfig
from resmol.model.cross_entropy import IGNORE_INDEX
from resmol.model.kv_cache import KVCache
from resmol.model.llama import CausalLM, RMSNorm, attend, document_mask, rotate, rotation_tables


def tiny(heads: int, key_value_heads: int, head_dim: int, layers: int, tied: bool, theta: float) -> ModelConfig:
    return ModelConfig(
        vocab_size=101,
        hidden_size=heads * head_dim,
        intermediate_size=3 * heads + 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )


SHAPES = st.builds(
    lambda groups, pairs, half, layers, tied, theta: tiny(groups * pairs, pairs, 2 * half, layers, tied, theta),
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.booleans(),
    st.sampled_from([100.0, 1e4, 1e5]),
)  # fmt: skip


@examples(25)
@given(config=SHAPES, attention=st.sampled_from(["sdpa", "eager"]))
def test_equals_transformers_on_any_shape(config: ModelConfig, attention: str) -> None:
    model = CausalLM(config, attention=attention)  # type: ignore[arg-type]
    model.init_weights(1)
    reference = LlamaForCausalLM(LlamaConfig(**config.to_hf()))
    reference.load_state_dict(model.state_dict(), strict=True)
    ids = (torch.arange(40).reshape(2, 20) * 13) % 101
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, rtol=1e-4, atol=1e-4)


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(3, eps=0.5)
    x = torch.tensor([[3.0, 0.0, 4.0]])
    assert torch.allclose(norm(x), x / math.sqrt(25 / 3 + 0.5))


def test_rms_norm_works_in_float32_on_bfloat16() -> None:
    norm, x = RMSNorm(64, 1e-5).bfloat16(), (torch.randn(2, 64) * 300).bfloat16()
    in_float32 = x.float()
    exact = (in_float32 * torch.rsqrt(in_float32.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert torch.equal(norm(x), exact)


@pytest.mark.parametrize("position", [0, 1, 300, 2500, 8191])
def test_rotation_is_the_complex_one(position: int) -> None:
    """Pair (i, i + Dh/2) is a complex number that is multiplied by exp(i x position x theta^(-2i / Dh))."""
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64)
    turned = rotate(x, rotation_tables(torch.tensor([position]), 8, 100_000.0))
    angles = position * 100_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    tolerance = (position + 1) * 2.0**-23  # the tables are float32, and so are the angles
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), -1), rtol=0, atol=4 * tolerance)
    torch.testing.assert_close(turned.norm(), x.norm(), rtol=1e-6, atol=0)


def test_tables_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, sin = rotation_tables(torch.arange(9), 8, 1e5)
    assert cos.dtype == sin.dtype == torch.float32


def test_query_heads_share_neighboring_key_value_heads() -> None:
    """Head h reads key/value head h // (H / K): changing pair 1 changes heads 3, 4 and 5 of 9, and no other."""
    query, key, value = torch.randn(1, 9, 5, 4), torch.randn(1, 3, 5, 4), torch.randn(1, 3, 5, 4)
    changed = value.clone()
    changed[:, 1] += 1
    for kind in ("sdpa", "eager"):
        moved = (attend(query, key, value, None, kind) - attend(query, key, changed, None, kind)).abs().amax((0, 2, 3))
        assert (moved > 1e-3).tolist() == [False] * 3 + [True] * 3 + [False] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_a_new_token_attends_in_each_head_to_its_own_keys(dtype: torch.dtype, masked: bool) -> None:
    """Heads that share keys go to the fused kernel as rows of one, in half precision; against float64, head by head."""
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 1, 16, generator=draw).to(dtype)
    key, value = (torch.randn(2, 2, 40, 16, generator=draw).to(dtype)[:, :, :33] for _ in range(2))
    mask = torch.arange(33)[None, None, None] >= torch.tensor([0, 9])[:, None, None, None] if masked else None
    found = attend(query, key, value, mask, "sdpa")
    assert (found.shape, found.dtype) == (query.shape, dtype)
    for row, head in itertools.product(range(2), range(6)):
        scores = key[row, head // 3].double() @ query[row, head, 0].double() / 4
        if mask is not None:
            scores = scores.masked_fill(~mask[row, 0, 0], -math.inf)
        wanted = scores.softmax(0) @ value[row, head // 3].double()
        torch.testing.assert_close(found[row, head, 0].double(), wanted, rtol=2e-2, atol=2 * torch.finfo(dtype).eps)


def test_a_token_sees_the_earlier_ones_of_its_document() -> None:
    documents = document_mask(torch.tensor([[0, 0, 1, 1]]))
    assert documents is not None
    assert documents[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_one_document_is_plain_causal_attention(tiny_config: RunConfig) -> None:
    model = CausalLM(tiny_config.model)
    model.init_weights(4)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids, torch.zeros_like(ids)), model(ids), rtol=1e-4, atol=1e-5)


def test_tied_is_one_tensor_and_untied_is_two(tiny_config: RunConfig) -> None:
    for tied in (True, False):
        config = tiny_config.model.model_copy(update={"tie_word_embeddings": tied})
        for model in (CausalLM(config), CausalLM.empty(config)):
            assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_initial_weights_are_a_function_of_the_seed_alone(tiny_config: RunConfig) -> None:
    first, second, other = (CausalLM.empty(tiny_config.model) for _ in range(3))
    first.init_weights(5)
    torch.manual_seed(123)
    second.init_weights(5)
    other.init_weights(6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_building_an_empty_model_draws_no_random_number(tiny_config: RunConfig) -> None:
    before = torch.get_rng_state()
    CausalLM.empty(tiny_config.model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_a_gpu_gives_the_same_logits(tiny_config: RunConfig) -> None:
    model = CausalLM(tiny_config.model)
    model.init_weights(5)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids)
        torch.testing.assert_close(model.cuda()(ids.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("with_documents", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_and_its_gradients_are_those_of_the_logits(
    tiny_config: RunConfig, tied: bool, with_documents: bool
) -> None:
    """The loss has a backward pass of its own, also for both uses of a tied matrix; autograd's is the judge."""
    config = tiny_config.model.model_copy(update={"tie_word_embeddings": tied})
    ids = torch.tensor([[5, 3, 5, 5, 9], [0, 3, 1, 2, 5]])
    targets = torch.tensor([[3, 5, 5, 9, 1], [3, IGNORE_INDEX, 2, 5, 5]])
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]) if with_documents else None
    model = CausalLM(config).double()
    model.init_weights(3)
    logits = model(ids, documents)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    found = model.loss(ids, targets, documents, chunk_tokens=3)
    torch.testing.assert_close(found, expected)
    parameters = list(model.parameters())
    for mine, other in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_the_loss_without_gradients_has_the_same_bits(tiny_config: RunConfig) -> None:
    model, ids = CausalLM(tiny_config.model), torch.arange(24).reshape(2, 12)
    model.init_weights(3)
    with torch.no_grad():
        evaluated = model.loss(ids, ids, chunk_tokens=7)
    assert torch.equal(evaluated, model.loss(ids, ids, chunk_tokens=7).detach())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_computing_blocks_again_gives_the_same_bits_and_keeps_less(tiny_config: RunConfig, attention: str) -> None:
    ids = torch.arange(48).reshape(2, 24) % 50
    documents = (torch.arange(24) >= 9).long().expand(2, 24)
    gradients, kept = [], []
    for recompute in (False, True):
        model = CausalLM(tiny_config.model, attention=attention)  # type: ignore[arg-type]
        model.init_weights(3)
        model.model.activation_checkpointing = recompute
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            total = model.hidden(ids, documents).square().sum()
        total.backward()
        gradients.append([p.grad for p in model.parameters()])
        kept.append(sum(sizes.values()))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2


def test_generation_with_a_cache_never_recomputes(tiny_config: RunConfig) -> None:
    model = CausalLM(tiny_config.model)
    model.init_weights(3)
    model.model.activation_checkpointing = True
    cache = KVCache(tiny_config.model, 1, 8)
    with torch.no_grad():
        model.hidden(torch.tensor([[1, 2, 3]]), cache=cache)
    assert cache.length == 3
