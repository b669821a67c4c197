"""Try positions up to the last one of the context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn

from resmol.checks import Check
from resmol.config.model_config import ModelConfig
from resmol.errors import CheckFailed
from resmol.model.llama import CausalLM
from resmol.verify.parity import ids_for
from resmol.verify.third_party.factory import Factory
from resmol.verify.third_party.third_party_model import ThirdPartyModel, build_small
from resmol.verify.third_party.weight_mapping import NameMap
from resmol.verify.tiny_models import LATE_LENGTH, compare_late, fill, one_tiny_block

# Where the factory builds nothing smaller: beyond the 2048 positions that many begin with.
LENGTH_AT_FULL_SIZE, SHORT_LENGTH = 2304, 320
LATE, CONTEXT = "late positions, float32", "context"


def late_block(config: ModelConfig) -> ModelConfig:
    """Return one tiny block with two heads: eager attention needs T x T numbers for each."""
    return one_tiny_block(config).model_copy(update={"hidden_size": 32, "num_attention_heads": 2})


def late_positions(factory: Factory, name_map: NameMap | None, module: ThirdPartyModel, weights: CausalLM) -> Check:
    """Compare the last positions of the whole context on a tiny block.

    A factory that builds one size only is compared on its first block alone, at some 2300 positions.
    """
    config = weights.config
    tiny = fill(CausalLM(late_block(config)), seed=5)
    small = build_small(factory, tiny.config, name_map)
    length = min(config.max_position_embeddings, LATE_LENGTH)
    if small is not None:
        small.load(tiny.state_dict())
        return _compared(small, tiny, length)
    length = min(length, LENGTH_AT_FULL_SIZE)
    if (blocks := _blocks(module)) is not None:
        one = CausalLM.empty(config.model_copy(update={"num_hidden_layers": 1}))
        one.load_state_dict({name: t for name, t in weights.state_dict().items() if name in one.state_dict()})
        with suppress(CheckFailed), _first_alone(*blocks):
            module(ids_for(config.vocab_size, 1, 2))  # some need all of their blocks
            return _compared(module, one, length)
    return _compared(module, weights, min(length, SHORT_LENGTH))


def _compared(run: ThirdPartyModel, ours: CausalLM, length: int) -> Check:
    try:
        return compare_late(run, ours, length, "float32")
    except CheckFailed as error:
        if "allocate" in error.what and length > SHORT_LENGTH:  # the memory of this machine, and no mistake
            return _compared(run, ours, length // 2)
        longest = _longest(run, ours, length)
        guards = "A context that is shorter than the configuration's: tables or masks of a fixed size."
        measured = f"{longest} positions run, {length} do not: {error.what}"
        return Check(CONTEXT, False, measured, f"all {length} positions of max_position_embeddings", guards)


@torch.no_grad()
def _longest(run: ThirdPartyModel, ours: CausalLM, length: int) -> int:
    """Return the longest text that runs, of halves of a length."""
    while length > 1:
        length //= 2
        with suppress(CheckFailed):
            run(ids_for(ours.config.vocab_size, 1, length))
            return length
    return 0


def _blocks(module: ThirdPartyModel) -> tuple[nn.Module, str] | None:
    """Return the module that owns the list of blocks, and the list's name there; None if there is no such list."""
    name = next((name for name, ours in module.mapping.layers.items() if ours == "model.layers.0"), "")
    path, _, _ = name.rpartition(".")
    parent, _, attribute = path.rpartition(".")
    owner = module.module.get_submodule(parent)
    return (owner, attribute) if isinstance(getattr(owner, attribute, None), nn.ModuleList) else None


@contextmanager
def _first_alone(owner: nn.Module, attribute: str) -> Iterator[None]:
    """Leave a module the first of its blocks only, while the context is open."""
    blocks = getattr(owner, attribute)
    setattr(owner, attribute, nn.ModuleList([blocks[0]]))
    try:
        yield
    finally:
        setattr(owner, attribute, blocks)
