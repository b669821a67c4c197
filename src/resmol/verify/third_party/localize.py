"""Find where an implementation differs first: the smallest model, the length and the block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resmol.errors import CheckFailed
from resmol.model.llama import CausalLM
from resmol.verify.capture import Captured, hidden_states
from resmol.verify.parity import ids_for
from resmol.verify.third_party.diagnose import SAME, Diagnosis, Setting, diagnose, relative_distance
from resmol.verify.third_party.factory import Factory
from resmol.verify.third_party.known_bugs import KNOWN_BUGS, KnownBug
from resmol.verify.third_party.late_positions import late_block
from resmol.verify.third_party.third_party_model import ThirdPartyModel, build_small
from resmol.verify.third_party.weight_mapping import NameMap
from resmol.verify.tiny_models import fill, two_tiny_blocks

# Four blocks: a mistake in every fourth one shows. Positions above 256 show what rounding to bfloat16 does.
BLOCKS, TOKENS = 4, 288
LATE_LENGTHS = (1280, 2560)  # T x T numbers for each head; beyond them only what begins at a position is tried
TOKENS_AT_FULL_SIZE, BLOCKS_WITH_PAIRS = 48, 4


@torch.no_grad()
def localized_diagnosis(
    factory: Factory, name_map: NameMap | None, model: ThirdPartyModel, weights: CausalLM
) -> Diagnosis | None:
    """Return the diagnosis made where an implementation first differs; None where it differs nowhere.

    Tried in this order: four tiny blocks; one tiny block on longer texts, up to the whole context; the module itself,
    block by block.

    Args:
        factory: Builds the tiny models, if it can.
        name_map: Hugging Face's names for its parameters.
        model: The module, with the weights.
        weights: Our model.
    """
    for setting, known in _settings(factory, name_map, model, weights):
        try:
            differs = setting.differs
        except CheckFailed:  # it does not run so far; the row of late positions says so
            continue
        if differs:
            blocks = setting.config.num_hidden_layers if setting.last_block is None else setting.last_block + 1
            return diagnose(setting, known, pairs=blocks <= BLOCKS_WITH_PAIRS)
    return None


def _settings(
    factory: Factory, name_map: NameMap | None, model: ThirdPartyModel, weights: CausalLM
) -> Iterator[tuple[Setting, Sequence[KnownBug]]]:
    config = weights.config
    four = fill(CausalLM(two_tiny_blocks(config).model_copy(update={"num_hidden_layers": BLOCKS})), seed=9)
    small = build_small(factory, four.config, name_map)
    if small is not None:
        small.load(four.state_dict())
        yield _setting(small, four, TOKENS), KNOWN_BUGS
    one = fill(CausalLM(late_block(config)), seed=9)
    small = build_small(factory, one.config, name_map)
    if small is not None:
        small.load(one.state_dict())
        for length in LATE_LENGTHS:
            yield _setting(small, one, length), KNOWN_BUGS
        yield _setting(small, one, config.max_position_embeddings), ()
    yield _at_full_size(model, weights), KNOWN_BUGS


def _setting(run: ThirdPartyModel, ours: CausalLM, length: int) -> Setting:
    return Setting(run, ours.state_dict(), ours.config, _ids(ours, length))


def _ids(ours: CausalLM, length: int) -> Int[Tensor, "1 T"]:
    return ids_for(ours.config.vocab_size, 1, min(length, ours.config.max_position_embeddings), seed=7)


def _at_full_size(model: ThirdPartyModel, weights: CausalLM) -> Setting:
    """Compare the output of the first block that differs, or the logits where blocks cannot be seen or agree."""
    ids = _ids(weights, TOKENS_AT_FULL_SIZE)
    theirs = _block_outputs(model, ids)
    ours: Captured = {}
    with hidden_states(weights, ours, None):
        weights(ids)
    for index in range(weights.config.num_hidden_layers):
        name = f"hidden states model.layers.{index}"
        if name not in theirs or theirs[name].shape != ours[name].shape:
            break
        if relative_distance(ours[name], theirs[name]) > SAME:
            run = partial(_block_output, model, name)
            return Setting(run, weights.state_dict(), weights.config, ids, index)
    return Setting(model, weights.state_dict(), weights.config, ids)


def _block_outputs(model: ThirdPartyModel, ids: Int[Tensor, "B T"]) -> Captured:
    """Return what the blocks of a module compute, by Hugging Face's names."""
    values: Captured = {}
    with hidden_states(model.module, values, model.mapping.layers):
        model.logits(ids)
    return values


def _block_output(model: ThirdPartyModel, name: str, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
    return _block_outputs(model, ids)[name]
