"""Somebody else's implementation, checked against the same float64 reference, and told what it does wrong."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from resmol.checks import Check
from resmol.config.model_config import ModelConfig
from resmol.errors import CheckFailed, UsageError
from resmol.model.llama import CausalLM
from resmol.system.byte_order_mark import decode_text
from resmol.verify.capture import next_token_loss, observe
from resmol.verify.parity import GUARDS, Baseline, arithmetic, baseline, errors, greedy_check, ids_for
from resmol.verify.rmsnorm import check_norm, norm_weight
from resmol.verify.third_party.diagnose import diagnose
from resmol.verify.third_party.weight_mapping import Factory, MappedModule, load_reference_weights
from resmol.verify.tiny_models import compare_late, fill, narrow, shallow, small

logger = logging.getLogger(__name__)

# Long enough for positions above 256 and 2048; attention that is written out needs T x T numbers for each head.
LATE_LENGTH, LATE_LENGTH_AT_FULL_SIZE = 4096, 320
DIAGNOSIS_TOKENS, DIAGNOSIS_TOKENS_AT_FULL_SIZE = 320, 48

NameMap = Mapping[str, str]
NAME_MAP_FIX = "give a JSON object: their name -> Hugging Face's"


def verify_foreign(
    factory: Factory,
    config: ModelConfig,
    name_map: NameMap | None = None,
) -> list[Check]:
    """Check somebody's implementation of an architecture, with our random weights copied into it.

    Args:
        factory: Takes the architecture, returns a module that takes ids [B, T] and returns logits [B, T, V]. It is
            also asked for small models, for long contexts and for the diagnosis; one that ignores its argument is
            checked on shorter texts.
        config: The architecture; models above 200 million parameters get fewer layers.
        name_map: Hugging Face's name for each of the module's parameters, where they differ; ``{}`` stands for the
            number of the layer: ``{"blocks.{}.wq.weight": "model.layers.{}.self_attn.q_proj.weight"}``.

    Returns:
        The checks. If one fails, the last one is a diagnosis in words, as far as there is one.

    Raises:
        DataError: transformers is not installed.
    """
    weights = fill(CausalLM.empty(shallow(config)), seed=8)
    checks: list[Check] = []
    try:
        logger.info("building the module and copying weights into it")
        adopted, checks = load_reference_weights(factory, weights, name_map)
        if adopted is None:
            return checks
        logger.info("comparing with transformers: logits, loss, gradients, positions, causality")
        checks += [_repeatable(adopted, weights.config), _causality(adopted, weights.config)]
        checks += _parity(adopted, weights)
        checks += [_late(factory, name_map, adopted, weights), *_norm(adopted, weights.config)]
        if not all(check.passed for check in checks):
            logger.info("looking for the mistake among the usual ones")
            checks.append(_diagnosis(factory, name_map, adopted, weights))
    except CheckFailed as error:
        guards = "A module that cannot be run cannot be trusted either."
        checks.append(Check("runs", False, error.what, error.fix, guards))
    return checks


# --- the table -----------------------------------------------------------------------------------------------


@torch.no_grad()
def _repeatable(adopted: MappedModule, config: ModelConfig) -> Check:
    ids = ids_for(config.vocab_size, 1, min(16, config.max_position_embeddings))
    same = torch.equal(adopted(ids), adopted(ids))
    return Check(
        "evaluation mode",
        same,
        "the same logits twice" if same else "other logits the second time",
        "the same logits twice",
        "Dropout that goes on in evaluation, or a state that is carried over from call to call.",
    )


@torch.no_grad()
def _causality(adopted: MappedModule, config: ModelConfig) -> Check:
    length = min(16, config.max_position_embeddings)
    ids = ids_for(config.vocab_size, 1, length)
    changed = ids.clone()
    changed[:, length // 2 :] = (changed[:, length // 2 :] + 1) % config.vocab_size
    before, after = adopted(ids)[:, : length // 2], adopted(changed)[:, : length // 2]
    moved = float((before - after).abs().max() / before.abs().max())
    return Check(
        "causality",
        moved <= 1e-5,
        f"other later tokens change earlier logits by {moved:.1e} of their size",
        "at most 1e-05, the rounding of float32",
        "No causal mask: logits of position t depend on later tokens, so the model reads the answer.",
    )


def _parity(adopted: MappedModule, weights: CausalLM) -> list[Check]:
    base = baseline(weights.config, weights.state_dict())
    found = errors(_observed(adopted, base.ids), base.exact)
    present = ["logits", "loss", "gradients"]
    if all(found[name] < float("inf") for name in found if name.startswith("hidden states")):
        present.insert(1, "hidden states")  # its blocks have the usual names
    checks = [base.compare(group, found) for group in present]
    checks += [_own_loss(adopted, base)] if "labels" in inspect.signature(adopted.model.forward).parameters else []
    checks.append(greedy_check(base.reference, weights.config, adopted, None))
    del base
    rounded = baseline(weights.config, weights.state_dict(), "bfloat16 autocast")
    with arithmetic("bfloat16 autocast"):
        found = errors(_observed(adopted, rounded.ids), rounded.exact)
    check = rounded.compare("logits", found)
    return [*checks, Check("logits, bfloat16 autocast", check.passed, check.measured, check.expected, check.guards)]


def _observed(adopted: MappedModule, ids: Int[Tensor, "B T"]) -> dict[str, Tensor]:
    def forward(ids: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        logits = adopted(ids)
        return logits, next_token_loss(logits.float(), ids)

    try:
        return observe(adopted.model, ids, forward, adopted.names)
    except RuntimeError as error:  # the forward pass is guarded; this is its backward pass
        raise CheckFailed(f"no gradients: {error}", fix="let autograd follow the forward pass") from error


@torch.no_grad()
def _own_loss(adopted: MappedModule, base: Baseline) -> Check:
    """Compare the loss that the module computes itself from ``labels=ids``, as Hugging Face's models do."""
    output = adopted.call(base.ids, labels=base.ids)
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple | list):
        loss = next((item for item in output if isinstance(item, Tensor) and item.dim() == 0), None)
    if not isinstance(loss, Tensor):
        return Check("loss from labels", False, "no loss in what it returns", "a loss", GUARDS["loss"])
    check = base.compare("loss", {"loss": errors({"loss": loss}, {"loss": base.exact["loss"]})["loss"]})
    reason = "" if check.passed else _shift(adopted(base.ids), base.ids, float(loss))
    return Check("loss from labels", check.passed, f"{float(loss):.4f}{reason}", check.expected, GUARDS["loss"])


def _shift(logits: Tensor, ids: Int[Tensor, "B T"], loss: float) -> str:
    """Say in words which wrong loss this is."""
    tokens = ids[:, 1:].numel()
    suspects = {
        "labels are never shifted: it learns to copy": _loss_at(logits, ids, 0),
        "labels are shifted twice: it learns token t + 2": _loss_at(logits, ids, 2),
        "the loss is a sum, not a mean": _loss_at(logits, ids, 1) * tokens,
        "the mean is taken over positions without a label too": _loss_at(logits, ids, 1) * tokens / ids.numel(),
    }
    return next((f": {what}" for what, value in suspects.items() if abs(value - loss) <= 1e-4 * abs(value)), "")


def _loss_at(logits: Tensor, ids: Int[Tensor, "B T"], shift: int) -> float:
    kept = logits[:, : ids.shape[1] - shift].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(kept, ids[:, shift:].flatten()))


def _late(factory: Factory, name_map: NameMap | None, adopted: MappedModule, weights: CausalLM) -> Check:
    """Compare late positions on a narrow model; at full size, where the factory makes nothing else."""
    narrow_weights = fill(CausalLM(narrow(weights.config)), seed=5)
    context = weights.config.max_position_embeddings
    try:
        other, _ = load_reference_weights(factory, narrow_weights, name_map)
        if other is not None:
            return compare_late(other, narrow_weights, min(context, LATE_LENGTH), "float32")
    except CheckFailed:  # sizes are written into it: that is not wrong
        pass
    return compare_late(adopted, weights, min(context, LATE_LENGTH_AT_FULL_SIZE), "float32")


def _norm(adopted: MappedModule, config: ModelConfig) -> list[Check]:
    """Check the module's norm alone, in bfloat16, where it is a module that can be called alone."""
    names = [name for name, ours in adopted.names.items() if ours == "model.norm.weight"]
    owner, _, attribute = names[0].rpartition(".")
    try:
        norm: nn.Module = copy.deepcopy(adopted.model.get_submodule(owner))
        with torch.no_grad():
            norm.get_parameter(attribute).copy_(norm_weight(config.hidden_size))
            norm = norm.bfloat16()
            if norm(torch.ones(2, config.hidden_size, dtype=torch.bfloat16)).dtype != torch.bfloat16:
                return []
    except Exception:  # a norm that is not a module of its own, or wants more than its input
        return []
    return [check_norm(config, norm)]


# --- the diagnosis -------------------------------------------------------------------------------------------


@torch.no_grad()
def _diagnosis(factory: Factory, name_map: NameMap | None, adopted: MappedModule, weights: CausalLM) -> Check:
    """Name the usual mistakes that reproduce the logits: on a small model, if the factory makes one."""
    run, of, length, pairs = adopted, weights, DIAGNOSIS_TOKENS_AT_FULL_SIZE, False
    small_weights = fill(CausalLM(small(weights.config)), seed=9)
    try:
        other, _ = load_reference_weights(factory, small_weights, name_map)
        if other is not None:
            run, of, length, pairs = other, small_weights, DIAGNOSIS_TOKENS, True
    except CheckFailed:
        pass
    ids = ids_for(of.config.vocab_size, 1, min(length, of.config.max_position_embeddings), seed=7)
    found = diagnose(run, of.state_dict(), of.config, ids, pairs=pairs)
    guards = "The logits are compared with those of deliberately wrong variants of the architecture, one mistake each."
    return Check("diagnosis", False, str(found), "nothing to diagnose", guards)


def import_factory(name: str) -> Callable[[ModelConfig], nn.Module]:
    """Import ``module:callable``, looking into the current directory as well (`UsageError` when it is not there)."""
    module_name, colon, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), attribute) if colon else None
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--model {name}: {error}", fix="name an importable module and a callable in it") from None
    if not callable(found):
        raise UsageError(f"--model {name} is not module:callable", fix="write e.g. --model my_model:build")
    return cast("Callable[[ModelConfig], nn.Module]", found)


def read_name_map(path: Path | None) -> dict[str, str] | None:
    """Return a map of parameter names read from a JSON file (`UsageError` when it is none)."""
    if path is None:
        return None
    try:
        table = json.loads(decode_text(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}", fix=NAME_MAP_FIX) from None
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise UsageError(f"{path} is not a map of names", fix=NAME_MAP_FIX)
    return table
