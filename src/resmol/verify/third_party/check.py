"""Check a third-party implementation against the same float64 reference, and name its mistake."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeGuard

import torch
from torch import nn

from resmol.checks import Check
from resmol.config.model_config import ModelConfig
from resmol.errors import CheckFailed
from resmol.model.llama import CausalLM
from resmol.verify.parity import Baseline, arithmetic, baseline, greedy_check, ids_for, rms_errors
from resmol.verify.rmsnorm import check_norm, norm_weight
from resmol.verify.third_party.diagnose import Diagnosis
from resmol.verify.third_party.factory import Factory
from resmol.verify.third_party.late_positions import late_positions
from resmol.verify.third_party.localize import localized_diagnosis
from resmol.verify.third_party.mapping_checks import mapping_checks, reading_check
from resmol.verify.third_party.own_loss import own_loss
from resmol.verify.third_party.own_weights import own_weights_checks
from resmol.verify.third_party.third_party_model import ThirdPartyModel, build_third_party
from resmol.verify.third_party.verdict import FORWARD, verdict
from resmol.verify.third_party.weight_mapping import NameMap
from resmol.verify.tiny_models import fill, shallow

logger = logging.getLogger(__name__)

SAME_LOGITS = 1e-5  # relative to their size: the rounding of float32


class _Judge:
    """Collects the rows of the table; what a module raises ends it with a row that says so."""

    def __init__(self, factory: Factory, config: ModelConfig, name_map: NameMap | None) -> None:
        self.factory, self.name_map = factory, name_map
        self.weights = fill(CausalLM.empty(shallow(config)), seed=8)
        self.checks: list[Check] = []
        self.model: ThirdPartyModel | None = None
        self.diagnosis: Diagnosis | None = None

    def run(self) -> None:
        config = self.weights.config
        logger.info("building the module; looking at its own weights and first loss")
        model = self.model = build_third_party(self.factory, config, self.name_map)
        self.checks += mapping_checks(model)
        if not model.mapping.complete:
            return
        self.checks += own_weights_checks(model)
        model.load(self.weights.state_dict())
        logger.info("comparing with transformers: logits, loss, gradients, causality, generated tokens")
        self.checks += [_repeatable(model, config), _training_mode(model, config), _causality(model, config)]
        self.checks += _parity(model, self.weights)
        logger.info("comparing the last positions of the context")
        self.checks += [late_positions(self.factory, self.name_map, model, self.weights), *_norm_note(model, config)]
        if any(check.name in FORWARD and not check.passed for check in self.checks):
            self._diagnose(model)

    def _diagnose(self, model: ThirdPartyModel) -> None:
        logger.info("looking for the place where it differs first, and comparing with the known bugs")
        self.diagnosis = localized_diagnosis(self.factory, self.name_map, model, self.weights)
        if self.diagnosis is not None:
            guards = "Results are compared with those of deliberately wrong variants of the architecture."
            expected = self.diagnosis.fix or "compare with the reference block by block, from the first that differs"
            self.checks.append(Check("diagnosis", False, str(self.diagnosis), expected, guards))


def verify_third_party(factory: Factory, config: ModelConfig, name_map: NameMap | None = None) -> list[Check]:
    """Check an implementation of an architecture: its own weights, then its results with our random weights in it.

    Args:
        factory: A class, a function or a module (see `build`): called with the architecture, it gives a module that
            takes ids [B, T] and returns logits [B, T, V]. It also builds the tiny models of the long contexts and the
            diagnosis; a factory that ignores its argument is checked on shorter texts.
        config: The architecture; models above 200 million parameters get fewer layers.
        name_map: Hugging Face's name for each of the module's parameters, where they are not recognized; ``{}`` stands
            for the number of the layer: ``{"blocks.{}.a.weight": "model.layers.{}.self_attn.q_proj.weight"}``. A
            parameter that holds the rows of several has a list.

    Returns:
        The checks. The last one is the verdict in one sentence; if the results are wrong, the one before it is a
        diagnosis. What is a matter of taste, such as a norm that loses a bit in pure bfloat16, is a note in a row that
        passes.

    Raises:
        DataError: transformers is not installed.
        UsageError: The map does not fit the module.
    """
    judge = _Judge(factory, config, name_map)
    try:
        judge.run()
    except CheckFailed as error:
        guards = "A module that cannot be run cannot be trusted."
        judge.checks.append(Check("runs", False, error.what, error.fix, guards))
    notes = [reading_check(judge.model)] if judge.model is not None and judge.model.notes else []
    return [*notes, *judge.checks, verdict(judge.checks, judge.model, judge.diagnosis)]


# --- the rows ------------------------------------------------------------------------------------------------


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
def _training_mode(module: ThirdPartyModel, config: ModelConfig) -> Check:
    """Two passes in training mode must give the logits of evaluation mode."""
    ids = ids_for(config.vocab_size, 1, min(16, config.max_position_embeddings))
    row, expected = "training mode", "the logits of evaluation mode, twice"
    guards = "Dropout, which SmolLM2 does not have; batch statistics."
    evaluation = module(ids)
    module.module.train()
    try:
        moved = [float((module(ids) - evaluation).abs().max() / evaluation.abs().max()) for _ in range(2)]
    except CheckFailed as error:
        return Check(row, False, error.what, error.fix, guards)
    finally:
        module.module.eval()
    found = {f"{name} (p = {part.p:g})" for name, part in module.module.named_modules() if _drops(part)}
    where = f": {min(found)}{f' and {len(found) - 1} more' if len(found) > 1 else ''}" if found else ""
    is_same = max(moved) <= SAME_LOGITS
    measured = "the logits of evaluation mode" if is_same else f"logits move by {max(moved):.1e} of their size{where}"
    return Check(row, is_same, measured, expected, guards)


def _drops(part: nn.Module) -> TypeGuard[nn.Dropout]:
    return isinstance(part, nn.Dropout) and part.p > 0


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
        moved <= SAME_LOGITS,
        f"other later tokens change earlier logits by {moved:.1e} of their size",
        "at most 1e-05, the rounding of float32",
        "No causal mask: logits of position t depend on later tokens, so the model reads the answer.",
    )


def _parity(module: ThirdPartyModel, weights: CausalLM) -> list[Check]:
    base = baseline(weights.config, weights.state_dict())
    errors = rms_errors(module.capture(base.ids), base.exact)
    checks = [base.compare(group, errors) for group in ("logits", "loss", "gradients")]
    if all(errors[name] < float("inf") for name in errors if name.startswith("hidden states")):
        checks.insert(1, _hidden_states(base, errors, logits_agree=checks[0].passed and checks[2].passed))
    checks += own_loss(module, base)
    checks.append(greedy_check(base.reference, weights.config, module, None))
    del base
    return [*checks, _autocast(module, weights)]


def _hidden_states(base: Baseline, errors: Mapping[str, float], *, logits_agree: bool) -> Check:
    """Name the first block whose output differs. Where all else agrees, the module draws its borders elsewhere."""
    check = base.compare("hidden states", errors)
    if check.passed:
        return check
    if logits_agree:
        return replace(check, passed=True, measured="not those of its blocks: it draws their borders elsewhere")
    names = [name for name in base.exact if name.startswith("hidden states")]
    first = next(name for name in names if not base.compare_all(name, [name], errors, "").passed)
    return replace(
        check, measured=f"{check.measured}; the first that differs is {first.removeprefix('hidden states ')}"
    )


def _autocast(module: ThirdPartyModel, weights: CausalLM) -> Check:
    base = baseline(weights.config, weights.state_dict(), "bfloat16 autocast")
    row = "logits, bfloat16 autocast"
    try:
        with arithmetic("bfloat16 autocast"):
            errors = rms_errors(module.capture(base.ids), base.exact)
    except CheckFailed as error:
        return Check(row, False, error.what, error.fix, "Mixed precision, in which nearly everybody trains.")
    return replace(base.compare("logits", errors), name=row)


def _norm_note(module: ThirdPartyModel, config: ModelConfig) -> list[Check]:
    """Look at the module's norm in pure bfloat16, if it can be called by itself: a note, and no failure.

    Training computes it like that neither in float32 nor under autocast.
    """
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
    check = check_norm(config, norm)
    note = f"a note, no failure: {check.measured}; in pure bfloat16 it loses precision: add .float() to its input"
    return [check if check.passed else replace(check, passed=True, measured=note)]
