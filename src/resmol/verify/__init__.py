"""`resmol verify`: is this the architecture that its config.json describes? Sanity first, then parity.

What is compared, and where the tolerances come from, is said in docs/verification.md.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from resmol.checks import Check
from resmol.config.model_config import ModelConfig
from resmol.errors import UsageError
from resmol.interop.load import load_model
from resmol.model.llama import CausalLM
from resmol.verify.parity import SEQUENCE, parity
from resmol.verify.rmsnorm import norm_precision
from resmol.verify.rope import rotation_checks
from resmol.verify.sanity import finite, sanity
from resmol.verify.third_party.check import import_factory, read_name_map, verify_foreign
from resmol.verify.tiny_models import FULL, STANDARD, shallow, twin_parity

logger = logging.getLogger(__name__)

__all__ = ["verify", "verify_foreign", "verify_model"]

Depth = Literal["standard", "full"]


def verify(
    config: ModelConfig,
    *,
    weights: CausalLM | None = None,
    depth: Depth = "standard",
) -> list[Check]:
    """Check an architecture against its own rules and against transformers.

    Args:
        config: The architecture.
        weights: A model of this architecture, on the CPU, to compare with its weights as they are; None takes random
            ones, and fewer layers for models above 200 million parameters.
        depth: "full" keeps all layers of large models, and takes longer sequences and more twins.

    Returns:
        The checks, failed ones included. Weights that are not numbers end them early.

    Raises:
        DataError: transformers is not installed.
        UsageError: The weights are not on the CPU, or of another architecture.
    """
    model = _given(config, weights) if weights is not None else _random_model(config, depth)
    logger.info("sanity: parameters, shapes, tying, first loss, causality, rotation")
    checks = [finite(model)]
    if not checks[0].passed:
        return checks
    checks += sanity(config, model, trained=weights is not None)
    checks += rotation_checks(config)
    layers = model.config.num_hidden_layers
    reduced = "" if layers == config.num_hidden_layers else f" at {layers} of {config.num_hidden_layers} layers"
    logger.info(f"parity with transformers{reduced}: logits, hidden states, loss, gradients, cache, generated tokens")
    checks += parity(model, sequence=SEQUENCE if depth == "standard" else 16 * SEQUENCE)
    logger.info("parity on small twins of many shapes, in float32 and bfloat16, and at the last positions")
    return [*checks, norm_precision(config), *twin_parity(config, STANDARD if depth == "standard" else FULL)]


def _given(config: ModelConfig, weights: CausalLM) -> CausalLM:
    if weights.config != config:
        raise UsageError("the weights are of another architecture", fix="pass the configuration that came with them")
    if weights.lm_head.weight.device.type != "cpu":
        raise UsageError(
            "the weights are not on the CPU", fix="load them there: the float64 float64_reference is computed there"
        )
    return weights


def _random_model(config: ModelConfig, depth: Depth) -> CausalLM:
    model = CausalLM.empty(shallow(config) if depth == "standard" else config)
    model.init_weights(seed=8)
    return model


def verify_model(
    config: ModelConfig,
    weights: str = "random",
    model: str | None = None,
    names: Path | None = None,
) -> list[Check]:
    """Verify our implementation, with random or given weights, or somebody else's.

    Args:
        config: The architecture, for random weights and for other implementations.
        weights: ``random``, or whatever `load_model` takes; the architecture is then theirs.
        model: Another implementation as ``module:callable``: called with ``config``, it returns a module that takes ids
            and returns logits. Naming it runs its code.
        names: A JSON file that maps its parameter names to Hugging Face's.

    Raises:
        UsageError: ``model`` cannot be imported, or ``names`` is not a map of names.
    """
    if model is not None:
        return verify_foreign(import_factory(model), config, read_name_map(names))
    if weights == "random":
        return verify(config)
    loaded = load_model(weights, device="cpu")
    return verify(loaded.config, weights=loaded.model)
