"""`resmol verify`: is this the architecture that its config.json describes? Sanity first, then parity.

What is compared, and where the tolerances come from, is said in docs/verification.md.
"""

from __future__ import annotations

from collections.abc import Callable

from resmol.checks import Check
from resmol.flops import total_parameters
from resmol.hf_config import ModelConfig
from resmol.model import CausalLM
from resmol.verify.parity import parity, twin_parity
from resmol.verify.sanity import sanity

__all__ = ["verify"]

# Above this, a model is verified at reduced depth: more blocks are more of the same.
FULL_DEPTH_PARAMETERS = 200_000_000


def verify(
    config: ModelConfig, *, weights: CausalLM | None = None, say: Callable[[str], None] = lambda _: None
) -> list[Check]:
    """Check an architecture against its own rules and against transformers.

    Args:
        config: The architecture.
        weights: A model to compare with its weights as they are; None takes random ones.
        say: Receives a sentence before each part.

    Returns:
        The checks, failed ones included.
    """
    say("sanity: instantiation, shapes, first loss, causality, rotation, cache")
    model = weights or _random_model(config)
    checks = sanity(model, trained=weights is not None)
    say("parity with transformers: logits, hidden states, loss, gradients, generated tokens")
    checks += parity(model)
    return [*checks, *twin_parity(config)]


def _random_model(config: ModelConfig) -> CausalLM:
    while total_parameters(config) > FULL_DEPTH_PARAMETERS and config.num_hidden_layers > 1:
        config = config.model_copy(update={"num_hidden_layers": max(1, config.num_hidden_layers // 2)})
    model = CausalLM.empty(config)
    model.initialise(seed=8)
    return model
