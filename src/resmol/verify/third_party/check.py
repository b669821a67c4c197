"""Check a third-party implementation against the same float64 reference, and name its mistake."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from resmol.checks import Check
from resmol.config.model_config import ModelConfig
from resmol.errors import CheckFailed
from resmol.model.llama import CausalLM
from resmol.verify.parity import GUARDS, Baseline, arithmetic, baseline, greedy_check, ids_for, rms_errors
from resmol.verify.rmsnorm import check_norm, norm_weight
from resmol.verify.third_party.diagnose import Run, diagnose
from resmol.verify.third_party.factory import Factory
from resmol.verify.third_party.mapping_checks import mapping_checks, reading_check
from resmol.verify.third_party.third_party_model import ThirdPartyModel, build_third_party
from resmol.verify.third_party.weight_mapping import NameMap
from resmol.verify.tiny_models import compare_late, fill, one_tiny_block, shallow, two_tiny_blocks

logger = logging.getLogger(__name__)

# Long enough for positions above 256 and 2048; eager attention needs T x T numbers for each head.
LATE_LENGTH, LATE_LENGTH_AT_FULL_SIZE = 4096, 320
DIAGNOSIS_TOKENS, DIAGNOSIS_TOKENS_AT_FULL_SIZE = 320, 48


def verify_third_party(factory: Factory, config: ModelConfig, name_map: NameMap | None = None) -> list[Check]:
    """Check an implementation of an architecture, with our random weights copied into it.

    Args:
        factory: A class, a function or a module (see `build`): called with the architecture, it gives a module that
            takes ids [B, T] and returns logits [B, T, V]. It also builds the tiny models of the long contexts and the
            diagnosis; a factory that ignores its argument is checked on shorter texts.
        config: The architecture; models above 200 million parameters get fewer layers.
        name_map: Hugging Face's name for each of the module's parameters, where they are not recognized; ``{}`` stands
            for the number of the layer: ``{"blocks.{}.a.weight": "model.layers.{}.self_attn.q_proj.weight"}``. A
            parameter that holds the rows of several has a list.

    Returns:
        The checks. If one fails, the last one is a diagnosis in words.

    Raises:
        DataError: transformers is not installed.
        UsageError: The map does not fit the module.
    """
    weights = fill(CausalLM.empty(shallow(config)), seed=8)
    checks: list[Check] = []
    try:
        logger.info("building the module and copying weights into it")
        model = build_third_party(factory, weights.config, name_map)
        checks = mapping_checks(model)
        if not model.mapping.complete:
            return checks
        model.load(weights.state_dict())
        logger.info("comparing with transformers: logits, loss, gradients, positions, causality")
        checks += [_repeatable(model, weights.config), _causality(model, weights.config)]
        checks += _parity(model, weights)
        checks += [_late(factory, name_map, model, weights), *_norm(model, weights.config)]
        if not all(check.passed for check in checks):
            logger.info("comparing with the known bugs")
            checks.append(_diagnosis(factory, name_map, model, weights))
        checks = [*([reading_check(model)] if model.notes else []), *checks]
    except CheckFailed as error:
        guards = "A module that cannot be run cannot be trusted."
        checks.append(Check("runs", False, error.what, error.fix, guards))
    return checks


def _tiny(factory: Factory, name_map: NameMap | None, tiny: CausalLM) -> ThirdPartyModel | None:
    """Return a tiny module with these weights, or None where the factory builds nothing else than one size."""
    try:
        model = build_third_party(factory, tiny.config, name_map)
    except CheckFailed:  # hard-coded sizes are not a mistake
        return None
    if not model.mapping.complete:
        return None
    model.load(tiny.state_dict())
    return model


# --- the table -----------------------------------------------------------------------------------------------


@torch.no_grad()
def _repeatable(module: ThirdPartyModel, config: ModelConfig) -> Check:
    ids = ids_for(config.vocab_size, 1, min(16, config.max_position_embeddings))
    same = torch.equal(module(ids), module(ids))
    return Check(
        "evaluation mode",
        same,
        "the same logits twice" if same else "other logits the second time",
        "the same logits twice",
        "Dropout in evaluation mode, or state that is carried over from call to call.",
    )


@torch.no_grad()
def _causality(module: ThirdPartyModel, config: ModelConfig) -> Check:
    length = min(16, config.max_position_embeddings)
    ids = ids_for(config.vocab_size, 1, length)
    changed = ids.clone()
    changed[:, length // 2 :] = (changed[:, length // 2 :] + 1) % config.vocab_size
    before, after = module(ids)[:, : length // 2], module(changed)[:, : length // 2]
    moved = float((before - after).abs().max() / before.abs().max())
    return Check(
        "causality",
        moved <= 1e-5,
        f"other later tokens change earlier logits by {moved:.1e} of their size",
        "at most 1e-05, the rounding of float32",
        "No causal mask: logits of position t depend on later tokens, so the model reads the answer.",
    )


def _parity(module: ThirdPartyModel, weights: CausalLM) -> list[Check]:
    base = baseline(weights.config, weights.state_dict())
    errors = rms_errors(module.capture(base.ids), base.exact)
    groups = ["logits", "loss", "gradients"]
    if all(errors[name] < float("inf") for name in errors if name.startswith("hidden states")):
        groups.insert(1, "hidden states")  # its blocks can be told apart
    checks = [base.compare(group, errors) for group in groups]
    checks += [_own_loss(module, base)] if module.label_argument else []
    checks.append(greedy_check(base.reference, weights.config, module, None))
    del base
    base = baseline(weights.config, weights.state_dict(), "bfloat16 autocast")
    with arithmetic("bfloat16 autocast"):
        errors = rms_errors(module.capture(base.ids), base.exact)
    return [*checks, replace(base.compare("logits", errors), name="logits, bfloat16 autocast")]


@torch.no_grad()
def _own_loss(module: ThirdPartyModel, base: Baseline) -> Check:
    """Compare the loss that the module computes itself from labels, as Hugging Face's models do."""
    loss = module.loss(base.ids, base.ids)
    if loss is None:
        return Check("loss from labels", False, "no loss in what it returns", "a loss", GUARDS["loss"])
    check = base.compare("loss", rms_errors({"loss": loss}, {"loss": base.exact["loss"]}))
    reason = "" if check.passed else _shift(module(base.ids), base.ids, float(loss))
    return Check("loss from labels", check.passed, f"{float(loss):.4f}{reason}", check.expected, GUARDS["loss"])


def _shift(logits: Tensor, ids: Int[Tensor, "B T"], loss: float) -> str:
    """Return in words which of the known wrong losses this is; empty for none of them."""
    tokens = ids[:, 1:].numel()
    wrong_losses = {
        "labels are never shifted: it learns to copy": _loss_at(logits, ids, 0),
        "labels are shifted twice: it learns token t + 2": _loss_at(logits, ids, 2),
        "the loss is a sum, not a mean": _loss_at(logits, ids, 1) * tokens,
        "the mean is taken over positions without a label too": _loss_at(logits, ids, 1) * tokens / ids.numel(),
    }
    return next((f": {what}" for what, value in wrong_losses.items() if abs(value - loss) <= 1e-4 * abs(value)), "")


def _loss_at(logits: Tensor, ids: Int[Tensor, "B T"], shift: int) -> float:
    kept = logits[:, : ids.shape[1] - shift].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(kept, ids[:, shift:].flatten()))


def _late(factory: Factory, name_map: NameMap | None, module: ThirdPartyModel, weights: CausalLM) -> Check:
    """Compare late positions on a tiny block; at full size where the factory builds nothing else."""
    tiny = fill(CausalLM(one_tiny_block(weights.config)), seed=5)
    context = weights.config.max_position_embeddings
    tiny_module = _tiny(factory, name_map, tiny)
    if tiny_module is not None:
        return compare_late(tiny_module, tiny, min(context, LATE_LENGTH), "float32")
    return compare_late(module, weights, min(context, LATE_LENGTH_AT_FULL_SIZE), "float32")


def _norm(module: ThirdPartyModel, config: ModelConfig) -> list[Check]:
    """Check the module's norm in bfloat16, if it can be called by itself."""
    names = [piece.parameter for piece in module.mapping.pieces if piece.target == "model.norm.weight"]
    owner, _, attribute = names[0].rpartition(".")
    try:
        norm: nn.Module = copy.deepcopy(module.module.get_submodule(owner))
        with torch.no_grad():
            norm.get_parameter(attribute).copy_(norm_weight(config.hidden_size))
            norm = norm.bfloat16()
            if norm(torch.ones(2, config.hidden_size, dtype=torch.bfloat16)).dtype != torch.bfloat16:
                return []
    except Exception:  # the norm is not a module of its own, or takes more than its input
        return []
    return [check_norm(config, norm)]


# --- the diagnosis -------------------------------------------------------------------------------------------


@torch.no_grad()
def _diagnosis(factory: Factory, name_map: NameMap | None, module: ThirdPartyModel, weights: CausalLM) -> Check:
    """Name the known bugs that reproduce the logits, on two tiny blocks if the factory builds them."""
    run: Run = module
    model, length, pairs = weights, DIAGNOSIS_TOKENS_AT_FULL_SIZE, False
    tiny = fill(CausalLM(two_tiny_blocks(weights.config)), seed=9)
    tiny_module = _tiny(factory, name_map, tiny)
    if tiny_module is not None:
        run, model, length, pairs = tiny_module, tiny, DIAGNOSIS_TOKENS, True
    ids = ids_for(model.config.vocab_size, 1, min(length, model.config.max_position_embeddings), seed=7)
    diagnosis = diagnose(run, model.state_dict(), model.config, ids, pairs=pairs)
    guards = "The logits are compared with those of deliberately wrong variants of the architecture, one bug each."
    return Check("diagnosis", False, str(diagnosis), "nothing to diagnose", guards)
