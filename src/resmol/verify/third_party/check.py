"""Check a third-party implementation against the same float64 reference, and name its mistake."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
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
from resmol.system.user_paths import user_path
from resmol.verify.capture import Captured, capture, next_token_loss
from resmol.verify.parity import GUARDS, Baseline, arithmetic, baseline, greedy_check, ids_for, rms_errors
from resmol.verify.rmsnorm import check_norm, norm_weight
from resmol.verify.third_party.diagnose import diagnose
from resmol.verify.third_party.weight_mapping import Factory, MappedModule, load_reference_weights
from resmol.verify.tiny_models import compare_late, fill, one_tiny_block, shallow, two_tiny_blocks

logger = logging.getLogger(__name__)

# Long enough for positions above 256 and 2048; eager attention needs T x T numbers for each head.
LATE_LENGTH, LATE_LENGTH_AT_FULL_SIZE = 4096, 320
DIAGNOSIS_TOKENS, DIAGNOSIS_TOKENS_AT_FULL_SIZE = 320, 48

NameMap = Mapping[str, str]
NAME_MAP_FIX = "give a JSON object: their name -> Hugging Face's"


def verify_third_party(factory: Factory, config: ModelConfig, name_map: NameMap | None = None) -> list[Check]:
    """Check an implementation of an architecture, with our random weights copied into it.

    Args:
        factory: Takes the architecture, returns a module that takes ids [B, T] and returns logits [B, T, V]. It also
            builds the tiny models of the long contexts and the diagnosis; a factory that ignores its argument is
            checked on shorter texts.
        config: The architecture; models above 200 million parameters get fewer layers.
        name_map: Hugging Face's name for each of the module's parameters, where they differ; ``{}`` stands for the
            number of the layer: ``{"blocks.{}.wq.weight": "model.layers.{}.self_attn.q_proj.weight"}``.

    Returns:
        The checks. If one fails, the last one is a diagnosis in words.

    Raises:
        DataError: transformers is not installed.
    """
    weights = fill(CausalLM.empty(shallow(config)), seed=8)
    checks: list[Check] = []
    try:
        logger.info("building the module and copying weights into it")
        module, checks = load_reference_weights(factory, weights, name_map)
        if module is None:
            return checks
        logger.info("comparing with transformers: logits, loss, gradients, positions, causality")
        checks += [_repeatable(module, weights.config), _causality(module, weights.config)]
        checks += _parity(module, weights)
        checks += [_late(factory, name_map, module, weights), *_norm(module, weights.config)]
        if not all(check.passed for check in checks):
            logger.info("comparing with the known bugs")
            checks.append(_diagnosis(factory, name_map, module, weights))
    except CheckFailed as error:
        guards = "A module that cannot be run cannot be trusted."
        checks.append(Check("runs", False, error.what, error.fix, guards))
    return checks


# --- the table -----------------------------------------------------------------------------------------------


@torch.no_grad()
def _repeatable(module: MappedModule, config: ModelConfig) -> Check:
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
def _causality(module: MappedModule, config: ModelConfig) -> Check:
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


def _parity(module: MappedModule, weights: CausalLM) -> list[Check]:
    base = baseline(weights.config, weights.state_dict())
    errors = rms_errors(_captured(module, base.ids), base.exact)
    groups = ["logits", "loss", "gradients"]
    if all(errors[name] < float("inf") for name in errors if name.startswith("hidden states")):
        groups.insert(1, "hidden states")  # its blocks have the usual names
    checks = [base.compare(group, errors) for group in groups]
    checks += [_own_loss(module, base)] if "labels" in inspect.signature(module.model.forward).parameters else []
    checks.append(greedy_check(base.reference, weights.config, module, None))
    del base
    base = baseline(weights.config, weights.state_dict(), "bfloat16 autocast")
    with arithmetic("bfloat16 autocast"):
        errors = rms_errors(_captured(module, base.ids), base.exact)
    return [*checks, replace(base.compare("logits", errors), name="logits, bfloat16 autocast")]


def _captured(module: MappedModule, ids: Int[Tensor, "B T"]) -> Captured:
    def forward(ids: Int[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        logits = module(ids)
        return logits, next_token_loss(logits.float(), ids)

    try:
        return capture(module.model, ids, forward, module.names)
    except RuntimeError as error:  # of the backward pass: the forward pass is guarded
        raise CheckFailed(f"no gradients: {error}", fix="let autograd follow the forward pass") from error


@torch.no_grad()
def _own_loss(module: MappedModule, base: Baseline) -> Check:
    """Compare the loss that the module computes itself from ``labels=ids``, as Hugging Face's models do."""
    output = module.call(base.ids, labels=base.ids)
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple | list):
        loss = next((item for item in output if isinstance(item, Tensor) and item.dim() == 0), None)
    if not isinstance(loss, Tensor):
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


def _late(factory: Factory, name_map: NameMap | None, module: MappedModule, weights: CausalLM) -> Check:
    """Compare late positions on a tiny block; at full size where the factory builds nothing else."""
    tiny = fill(CausalLM(one_tiny_block(weights.config)), seed=5)
    context = weights.config.max_position_embeddings
    try:
        tiny_module, _ = load_reference_weights(factory, tiny, name_map)
        if tiny_module is not None:
            return compare_late(tiny_module, tiny, min(context, LATE_LENGTH), "float32")
    except CheckFailed:  # hard-coded sizes are not a mistake
        pass
    return compare_late(module, weights, min(context, LATE_LENGTH_AT_FULL_SIZE), "float32")


def _norm(module: MappedModule, config: ModelConfig) -> list[Check]:
    """Check the module's norm in bfloat16, if it can be called by itself."""
    names = [name for name, ours in module.names.items() if ours == "model.norm.weight"]
    owner, _, attribute = names[0].rpartition(".")
    try:
        norm: nn.Module = copy.deepcopy(module.model.get_submodule(owner))
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
def _diagnosis(factory: Factory, name_map: NameMap | None, module: MappedModule, weights: CausalLM) -> Check:
    """Name the known bugs that reproduce the logits, on two tiny blocks if the factory builds them."""
    run, model, length, pairs = module, weights, DIAGNOSIS_TOKENS_AT_FULL_SIZE, False
    tiny = fill(CausalLM(two_tiny_blocks(weights.config)), seed=9)
    try:
        tiny_module, _ = load_reference_weights(factory, tiny, name_map)
        if tiny_module is not None:
            run, model, length, pairs = tiny_module, tiny, DIAGNOSIS_TOKENS, True
    except CheckFailed:
        pass
    ids = ids_for(model.config.vocab_size, 1, min(length, model.config.max_position_embeddings), seed=7)
    diagnosis = diagnose(run, model.state_dict(), model.config, ids, pairs=pairs)
    guards = "The logits are compared with those of deliberately wrong variants of the architecture, one bug each."
    return Check("diagnosis", False, str(diagnosis), "nothing to diagnose", guards)


def import_factory(name: str) -> Callable[[ModelConfig], nn.Module]:
    """Import ``module:callable``, from the current directory too (`UsageError` when it is not there)."""
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
        table = json.loads(decode_text(user_path(path).read_bytes()))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}", fix=NAME_MAP_FIX) from None
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise UsageError(f"{path} is not a map of names", fix=NAME_MAP_FIX)
    return table
