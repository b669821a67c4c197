"""All the checks of an architecture, in the order in which they are reported."""

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
from resmol.verify.third_party.check import verify_third_party
from resmol.verify.third_party.factory import import_factory
from resmol.verify.third_party.name_file import read_name_map
from resmol.verify.tiny_models import FULL, STANDARD, shallow, tiny_model_parity
from resmol.verify.training import training_parity

logger = logging.getLogger(__name__)

Depth = Literal["standard", "full"]


def verify_model(
    config: ModelConfig,
    weights: str = "random",
    model: str | None = None,
    names: Path | None = None,
) -> list[Check]:
    """Verify our implementation, with random or given weights, or a third-party one.

    Args:
        config: The architecture, for random weights and for other implementations.
        weights: ``random``, or anything `load_model` accepts, which also brings its architecture.
        model: Another implementation as ``path.py:Class`` or ``module:function``. Naming it runs its code.
        names: A JSON file that maps its parameter names to Hugging Face's.

    Raises:
        UsageError: ``model`` cannot be imported, or ``names`` is not a map of names.
        CheckFailed: Importing ``model`` raises an exception.
    """
    if model is not None:
        return verify_third_party(import_factory(model), config, read_name_map(names))
    if weights == "random":
        return verify(config)
    loaded = load_model(weights, device="cpu")
    return verify(loaded.config, weights=loaded.model)


def verify(config: ModelConfig, *, weights: CausalLM | None = None, depth: Depth = "standard") -> list[Check]:
    """Check our implementation of an architecture against its own rules and against transformers.

    Args:
        config: The architecture.
        weights: A model of this architecture, on the CPU, whose weights are used as they are; None draws random ones,
            for fewer layers when the model has more than 200 million parameters.
        depth: "full" keeps all layers of large models, and adds longer sequences and more tiny models.

    Returns:
        The checks, failed ones included. NaN or infinity in the weights ends them early.

    Raises:
        DataError: transformers is not installed.
        UsageError: The weights are not on the CPU, or belong to another architecture.
    """
    model = _checked(config, weights) if weights is not None else _random_model(config, depth)
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
    logger.info(
        "parity of a training step: matmul backends, bfloat16, float16, activation checkpointing, compiled block"
    )
    checks += training_parity(config)
    logger.info("parity of tiny models of many shapes, in float32 and bfloat16, and at the last positions")
    checks.append(norm_precision(config))
    return checks + tiny_model_parity(config, STANDARD if depth == "standard" else FULL)


def _checked(config: ModelConfig, weights: CausalLM) -> CausalLM:
    if weights.config != config:
        raise UsageError("the weights belong to another architecture", fix="pass the configuration they came with")
    if weights.lm_head.weight.device.type != "cpu":
        raise UsageError("the weights are not on the CPU", fix="load them there: float64 is computed on the CPU")
    return weights


def _random_model(config: ModelConfig, depth: Depth) -> CausalLM:
    model = CausalLM.empty(shallow(config) if depth == "standard" else config)
    model.init_weights(seed=8)
    return model
