"""Look at the weights that a factory gives by itself, before ours are copied in: their size, and the first loss."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from resmol.checks import Check
from resmol.config.model_config import ModelConfig
from resmol.verify.capture import next_token_loss
from resmol.verify.parity import ids_for
from resmol.verify.third_party.third_party_model import ThirdPartyModel

LOSS_TEXTS, LOSS_LENGTH = 4, 64
# Larger ones than this many times config.json's start badly: nn.Embedding's is 24 times SmolLM2's. Much smaller ones
# work (0.02 is usual, whatever the width), unless a matrix is as good as zero.
FACTOR, NOTHING = 3.0, 0.01
NEAR = 0.1
ADD_TO_RESIDUAL = ("o_proj", "down_proj")


@torch.no_grad()
def own_weights_checks(model: ThirdPartyModel) -> list[Check]:
    """Check a module's own initial weights; `ThirdPartyModel.load` must not have been called."""
    return [_standard_deviations(model), _first_loss(model)]


def _standard_deviations(model: ThirdPartyModel) -> Check:
    """Compare the standard deviation of each kind of matrix with config.json's initializer_range.

    ``o_proj`` and ``down_proj`` may be smaller, down to zero: they add to the residual stream.
    """
    wanted = model.config.initializer_range
    wrong, notes = [], []
    for kind, std in _by_kind(model).items():
        smallest = 0.0 if kind in ADD_TO_RESIDUAL else wanted * NOTHING
        if not smallest <= std <= wanted * FACTOR:
            wrong.append(f"{kind} {std:.3g}")
        elif kind not in ADD_TO_RESIDUAL and not abs(std / wanted - 1) <= NEAR:
            notes.append(f"{kind} {std:.3g}")
    others = ", ".join(wrong or notes)
    measured = f"standard deviation: {others}; config.json's initializer_range is {wanted:.3g}"
    return Check(
        "initial weights",
        not wrong,
        measured if wrong else f"a note, no failure: {measured}" if notes else f"as config.json says: {wanted:.3g}",
        f"N(0, {wanted:.3g}^2), initializer_range of config.json; at most {FACTOR:g} times that",
        "No initialization: nn.Embedding draws N(0, 1), and a tied output layer then begins with a loss near 400.",
    )


def _by_kind(model: ThirdPartyModel) -> dict[str, float]:
    """Return the root mean square of each kind of matrix, the largest over all layers."""
    kinds: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in model.weights().items():
        if tensor.dim() == 2 and not (name.startswith("lm_head") and model.tied):
            kinds[name.split(".")[-2]].append(tensor)
    return {kind: max(float(tensor.double().pow(2).mean().sqrt()) for tensor in all_) for kind, all_ in kinds.items()}


def _first_loss(model: ThirdPartyModel) -> Check:
    """Compare with ln V plus half the variance of the logits, as the right initialization gives it.

    See `resmol.verify.sanity`. Smaller weights than config.json's give a loss nearer to ln V; both are right.
    """
    config = model.config
    ids = ids_for(config.vocab_size, LOSS_TEXTS, min(LOSS_LENGTH, config.max_position_embeddings), seed=1)
    loss = float(next_token_loss(model.logits(ids).double(), ids))
    lowest, highest = _range_of_losses(config, ids[:, 1:].numel())
    return Check(
        "first loss",
        lowest <= loss <= highest,
        f"{loss:.2f} with the module's own weights",
        f"{lowest:.2f} to {highest:.2f}: ln V is {math.log(config.vocab_size):.2f}",
        "Weights without an initialization: training begins with a loss of hundreds, and nothing says why.",
    )


def _range_of_losses(config: ModelConfig, tokens: int) -> tuple[float, float]:
    variance = config.hidden_size * config.initializer_range**2
    rounding = 6 * math.sqrt(variance / tokens) + 0.5
    uniform = math.log(config.vocab_size)
    return uniform - rounding, uniform + variance / 2 + rounding
