"""The cache gives back what was put in, in order, and the model's output does not depend on how it was filled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from resmol.config.run_config import RunConfig
from resmol.model.kv_cache import KVCache
from resmol.model.llama import CausalLM


def test_extend_returns_everything_so_far(tiny_config: RunConfig) -> None:
    cache = KVCache(tiny_config.model, batch_size=2, capacity=10)
    layer, shape = cache.layers[0], (2, 1, 3, tiny_config.model.head_dim)
    first, second = torch.randn(shape), torch.randn(shape)
    layer.extend(first, -first)
    keys, values = layer.extend(second, -second)
    assert torch.equal(keys, torch.cat([first, second], dim=2))
    assert torch.equal(values, -keys)
    assert cache.length == 6
    assert cache.layers[1].length == 0


@pytest.fixture(scope="module")
def model(tiny_config: RunConfig) -> CausalLM:
    model = CausalLM(tiny_config.model)
    model.init_weights(2)
    return model


@examples(25)
@given(parts=st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_any_way_of_filling_it_gives_the_whole(model: CausalLM, parts: list[int]) -> None:
    ids = (torch.arange(2 * sum(parts)).reshape(2, -1) * 37) % 512
    cache = KVCache(model.config, 2, sum(parts))
    with torch.no_grad():
        whole = model(ids)
        pieces = [model(piece, cache=cache) for piece in ids.split(parts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert cache.length == sum(parts)


def test_positions_and_mask_of_the_next_tokens(tiny_config: RunConfig) -> None:
    cache = KVCache(tiny_config.model, batch_size=2, capacity=8)
    assert cache.mask(4) is None
    cache.layers[0].extend(*torch.zeros(2, 2, 1, 2, tiny_config.model.head_dim))
    assert cache.positions(2).tolist() == [2, 3]
    assert cache.mask(1) is None
    past = cache.mask(2)
    assert past is not None
    assert past[0, 0].tolist() == [[True, True, True, False], [True, True, True, True]]


def test_rows_that_begin_in_different_slots_count_from_their_own(tiny_config: RunConfig) -> None:
    cache = KVCache(tiny_config.model, batch_size=2, capacity=8)
    cache.align([0, 2], length=3)
    assert cache.positions(2).tolist() == [[[3, 4]], [[1, 2]]]
    seen = cache.mask(2)
    assert seen is not None
    assert seen[:, 0].int().tolist() == [[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]]


def test_a_full_cache_is_an_error_and_not_a_silent_cut(model: CausalLM) -> None:
    cache = KVCache(model.config, 1, 4)
    with pytest.raises(RuntimeError), torch.no_grad():
        model(torch.arange(5)[None], cache=cache)


def test_a_row_is_a_window_into_the_whole(tiny_config: RunConfig) -> None:
    cache = KVCache(tiny_config.model, batch_size=3, capacity=9)
    shape = (1, 1, 4, tiny_config.model.head_dim)
    written = torch.randn(shape)
    cache.row(1, end=6, length=4).layers[0].extend(written, -written)
    assert torch.equal(cache.layers[0].keys[1, :, 2:6], written[0])
    assert torch.equal(cache.layers[0].values[1, :, 2:6], -written[0])
    assert int(cache.layers[0].keys.count_nonzero()) == written.numel()
    assert cache.length == 0


def test_kept_rows_move_with_their_beginnings(tiny_config: RunConfig) -> None:
    cache = KVCache(tiny_config.model, batch_size=3, capacity=4)
    for layer in cache.layers:
        layer.keys += torch.arange(3)[:, None, None, None]
    cache.align([0, 2, 1], length=3)
    cache.keep([1, 2])
    assert cache.starts is not None
    assert (cache.starts.tolist(), cache.length) == ([2, 1], 3)
    assert cache.layers[1].keys[:, 0, 0, 0].tolist() == [1.0, 2.0]
