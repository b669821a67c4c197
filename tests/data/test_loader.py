from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples

from resmol.data.loader import IGNORE_INDEX, Batches, Loader, ring_start
from resmol.data.shards import Shard, TokenStream
from resmol.data.shuffle import WindowShuffle
from resmol.errors import ConfigError, DataError

EOS = 0


def stream_of(folder, tokens, *, shards=1) -> TokenStream:
    parts = np.array_split(np.array(tokens, dtype="<u2"), shards)
    entries = []
    for number, part in enumerate(parts):
        (folder / f"{number:05d}.ds").write_bytes(part.tobytes())
        digest = "0" * 64
        entries.append(
            Shard(
                name=f"{number:05d}.ds",
                bytes=part.nbytes,
                sha256=digest,
                index_sha256=digest,
                start=0,
                tokens=len(part),
                documents=0,
            )
        )
    return TokenStream(folder, entries, token_bytes=2, vocab_size=60_000)


def loader_of(stream, **changes) -> Loader:
    options = {"seq_len": 8, "micro_batch_size": 2, "grad_accum_steps": 4, "seed": 1, "eos_id": EOS}
    return Loader(stream, **(options | changes))


def test_windows_are_inputs_and_their_shifted_targets(tmp_path):
    loader = loader_of(stream_of(tmp_path, range(100, 181), shards=3))
    batches = list(loader.sequential(4))
    assert [batch.window_ids for batch in batches] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    inputs = torch.cat([batch.input_ids for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.flatten().tolist() == list(range(100, 180))
    assert targets.flatten().tolist() == list(range(101, 181))
    assert [batch.tokens for batch in batches] == [32, 32, 16]
    assert [batch.window_ids for batch in loader.sequential(4, limit=3)] == [(0, 1, 2)]


def test_the_last_window_is_padded_and_the_padding_is_no_target(tmp_path):
    loader = loader_of(stream_of(tmp_path, range(100, 112)))
    (batch,) = loader.sequential(10)
    assert loader.n_windows == 2
    assert batch.input_ids[1].tolist() == [108, 109, 110, EOS, EOS, EOS, EOS, EOS]
    assert batch.targets[1].tolist() == [109, 110, 111, *[IGNORE_INDEX] * 5]
    assert batch.tokens == 11


@examples(40)
@given(
    length=st.integers(5, 90),
    seq_len=st.integers(1, 4),
    size=st.integers(1, 3),
    micro_batches=st.integers(1, 3),
    seed=st.integers(0, 9),
    recut=st.booleans(),
)
def test_every_token_but_the_first_is_a_target_once_an_epoch(
    tmp_path_factory, length, seq_len, size, micro_batches, seed, recut
):
    """The first is that of the text or, where windows are cut anew, the one that the epoch begins with."""
    stream = stream_of(tmp_path_factory.mktemp("s"), range(1, length + 1), shards=2)
    sizes = {"seq_len": seq_len, "micro_batch_size": size, "grad_accum_steps": micro_batches}
    loader = loader_of(stream, seed=seed, recut=recut, **sizes)
    per_step = size * micro_batches
    windows: list[int] = []
    targets: list[int] = []
    seen = 0
    while len(windows) < 2 * loader.n_windows:
        found = loader.step_after(seen)
        batches = list(found.batches)
        assert [window for batch in batches for window in batch.window_ids] == loader.windows_after(seen).tolist()
        assert found.tokens == sum(batch.tokens for batch in batches)
        for batch in batches:
            assert ((batch.targets == batch.input_ids % length + 1) | (batch.targets == IGNORE_INDEX)).all()
            windows += batch.window_ids
            targets += [tuple(row[row != IGNORE_INDEX].tolist()) for row in batch.targets]
        assert found.windows_seen == seen + per_step
        assert found.epoch == (seen + per_step) / loader.n_windows
        seen = found.windows_seen
    for epoch in range(2):
        part = slice(epoch * loader.n_windows, (epoch + 1) * loader.n_windows)
        assert sorted(windows[part]) == list(range(loader.n_windows))
        first = ring_start(seed, epoch, length) + 1 if recut and epoch else 1
        assert sorted(token for row in targets[part] for token in row) == sorted({*range(1, length + 1)} - {first})


def test_rows_that_are_cut_up_have_the_same_tokens_and_documents(tmp_path):
    loader = loader_of(stream_of(tmp_path, [1, 2, 3, EOS, 5, 6, 7, 8, 9, 10, 11]))
    (batch,) = loader.sequential(10)
    short = batch.cut(2)
    assert short.input_ids.tolist() == [[1, 2], [3, EOS], [5, 6], [7, 8], [9, 10], [EOS, EOS], [EOS, EOS], [EOS, EOS]]
    assert short.targets[:5].tolist() == [[2, 3], [EOS, 5], [6, 7], [8, 9], [10, 11]]
    assert short.document_ids is not None
    assert short.document_ids[:4].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert (short.window_ids, short.tokens) == (batch.window_ids, batch.tokens)
    assert batch.cut(8) is batch


def test_windows_that_are_cut_anew_are_others_in_each_epoch_and_the_same_on_any_number_of_ranks(tmp_path):
    stream = stream_of(tmp_path, range(1, 90))  # 11 windows
    loader = loader_of(stream, recut=True)
    steps = [loader.step_after(seen) for seen in range(0, 40, 8)]

    def rows(batches):
        return [(w, tuple(ids)) for b in batches for w, ids in zip(b.window_ids, b.input_ids.tolist(), strict=True)]

    read = rows(batch for step in steps for batch in step.batches)
    cuts = [dict(read[epoch * 11 : (epoch + 1) * 11]) for epoch in range(3)]
    assert cuts[0] == dict(rows(loader.sequential(1)))
    assert not set(cuts[0].values()) & set(cuts[1].values())
    assert not set(cuts[1].values()) & set(cuts[2].values())
    for seen, whole in zip(range(0, 40, 8), steps, strict=True):
        shares = [loader.step_after(seen, rank, 2) for rank in range(2)]
        both = torch.cat([batch.input_ids for share in shares for batch in share.batches])
        assert torch.equal(both, torch.cat([batch.input_ids for batch in whole.batches]))
        assert {share.window_digest for share in shares} == {whole.window_digest}


def test_steps_continue_across_the_border_of_an_epoch(tmp_path):
    loader = loader_of(stream_of(tmp_path, range(1, 90)), grad_accum_steps=2)  # 11 windows, 4 a step
    straight = WindowShuffle(11, 1).windows(np.arange(40, dtype=np.int64)).tolist()
    assert [int(window) for seen in range(0, 40, 4) for window in loader.windows_after(seen)] == straight


@pytest.mark.parametrize("sizes", [(4, 8, 8, 2), (8, 4, 2, 2, 8)], ids=["doubled first", "halved first"])
def test_a_batch_size_that_changes_skips_and_repeats_nothing(tmp_path, sizes):
    stream = stream_of(tmp_path, range(1, 90))  # 11 windows
    straight = WindowShuffle(11, 1).windows(np.arange(sum(sizes), dtype=np.int64)).tolist()
    seen, windows, epochs = 0, [], [0.0]
    for size in sizes:
        step = loader_of(stream, micro_batch_size=1, grad_accum_steps=size).step_after(seen)
        seen = step.windows_seen
        windows += [window for batch in step.batches for window in batch.window_ids]
        epochs.append(step.epoch)
    assert (windows, seen) == (straight, sum(sizes))
    assert epochs == sorted(epochs)
    assert epochs[-1] == sum(sizes) / 11


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_a_step_without_overlap(tmp_path, world_size):
    loader = loader_of(stream_of(tmp_path, range(1, 500)))
    for seen in (0, 8, 48, 56, 64, 800):
        shares = [loader.step_after(seen, rank, world_size) for rank in range(world_size)]
        together = [window for share in shares for batch in share.batches for window in batch.window_ids]
        assert together == loader.windows_after(seen).tolist()
        alone = loader.step_after(seen)
        assert {(share.tokens, share.window_digest, share.windows_seen, share.epoch) for share in shares} == {
            (alone.tokens, alone.window_digest, alone.windows_seen, alone.epoch)
        }


@pytest.mark.parametrize(("rank", "world_size"), [(0, 3), (0, 8), (2, 2), (-1, 2), (0, 0)])
def test_ranks_that_cannot_share_are_refused(tmp_path, rank, world_size):
    loader = loader_of(stream_of(tmp_path, range(1, 500)))
    with pytest.raises(ConfigError):
        loader.step_after(0, rank, world_size)


def test_the_order_does_not_depend_on_how_a_step_is_cut(tmp_path):
    stream = stream_of(tmp_path, range(1, 500))
    one = loader_of(stream, micro_batch_size=8, grad_accum_steps=1)
    other = loader_of(stream, micro_batch_size=1, grad_accum_steps=8)
    for seen in (0, 32, 392):
        assert one.step_after(seen).window_digest == other.step_after(seen).window_digest


def test_the_digest_names_the_windows(tmp_path):
    stream = stream_of(tmp_path, range(1, 500))
    loader = loader_of(stream)
    ids = loader.windows_after(16)
    assert loader.step_after(16).window_digest == hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16]
    assert len({loader.step_after(8 * step).window_digest for step in range(99)}) == 99
    assert loader_of(stream, seed=2).step_after(16).window_digest != loader.step_after(16).window_digest


def test_the_facts_of_a_step_are_computed_once(tmp_path, monkeypatch):
    loader, calls, windows = loader_of(stream_of(tmp_path, range(1, 500))), [], WindowShuffle.windows
    monkeypatch.setattr(WindowShuffle, "windows", lambda self, places: calls.append(1) or windows(self, places))
    step = loader.step_after(8)
    first, again = [[batch.window_ids for batch in step.batches] for _ in range(2)]
    assert (first, len(first)) == (again, 4), "a step that is computed again reads the same"
    assert len(calls) == 1


def test_batches_are_read_when_they_are_asked_for(tmp_path):
    loader, reads = loader_of(stream_of(tmp_path, range(1, 500))), []
    assert isinstance(loader.step_after(0).batches, Batches)
    batches = Batches(lambda windows: reads.append(windows) or loader._batch(windows), [[4, 2], [7], [3]])
    assert (len(batches), len(batches[::2]), reads) == (3, 2, [])
    assert [batch.window_ids for batch in batches[::2]] == [(4, 2), (3,)]
    assert batches[-1].window_ids == (3,)
    assert reads == [[4, 2], [3], [3]]


# Documents


def test_document_ids_count_the_ends_before(tmp_path):
    tokens = [5, 6, EOS, 7, EOS, EOS, 8, 9, 1, *[3] * 8]
    (batch,) = loader_of(stream_of(tmp_path, tokens)).sequential(2)
    # The end token belongs to the document it ends.
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0] * 8]
    assert batch.document_ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("tokens", "needed"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], False),
        ([1, 2, 3, 4, 5, 6, 7, EOS, 9], False),  # an end at the last input position changes nothing
        ([1, 2, 3, 4, 5, 6, EOS, 8, 9], True),
        ([EOS, 2, 3, 4, 5, 6, 7, 8, 9], True),
    ],
)
def test_document_ids_are_left_out_where_plain_attention_is_the_same(tmp_path, tokens, needed):
    stream = stream_of(tmp_path, tokens)
    assert (loader_of(stream).sequential(1)[0].document_ids is not None) == needed
    assert loader_of(stream, document_mask=False).sequential(1)[0].document_ids is None


def test_real_documents_are_separated(tiny_dataset, tiny_tokenizer):
    loader = loader_of(tiny_dataset.train, seq_len=64)
    for batch in loader.step_after(0).batches:
        borders = batch.input_ids == tiny_tokenizer.eos_id
        if batch.document_ids is not None:
            steps = batch.document_ids.diff(dim=1)
            assert (steps == borders[:, :-1].long()).all()


# Sizes


def test_too_few_tokens_are_an_error_that_says_how_many(tmp_path):
    stream = stream_of(tmp_path, range(1, 9))
    with pytest.raises(DataError, match="8 tokens; a window of 8 needs 9"):
        loader_of(stream)
    (batch,) = loader_of(stream, allow_short=True).sequential(4)
    assert batch.tokens == 7


def test_one_token_is_never_enough(tmp_path):
    with pytest.raises(DataError, match="needs 2"):
        loader_of(stream_of(tmp_path, [1]), allow_short=True)


@pytest.mark.parametrize("name", ["seq_len", "micro_batch_size", "grad_accum_steps"])
def test_sizes_below_one_are_refused(tmp_path, name):
    with pytest.raises(ConfigError):
        loader_of(stream_of(tmp_path, range(1, 500)), **{name: 0})


def test_a_place_before_the_first_window_is_refused(tmp_path):
    with pytest.raises(ValueError, match="-1 windows"):
        loader_of(stream_of(tmp_path, range(1, 500))).windows_after(-1)
