"""Parity with transformers, with tolerances that are derived.

The yardstick is the reference itself in float64. Its own float32 (or bfloat16) result misses that by some rounding
error; ours must miss it by no more than a small factor of the same. A wrong architecture misses it by orders of
magnitude, and a tolerance guessed by hand is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from resmol.checks import Check
from resmol.generate import Sampling, generate
from resmol.hf_config import ModelConfig
from resmol.loss import cross_entropy_sum
from resmol.model import CausalLM

# Our error against float64 may be this many times the reference's own, plus this many units in the last place.
FACTOR, ULPS = 4.0, 8.0
GREEDY_TOKENS = 24

# Heads H, key/value heads K, head size, layers, feed-forward width, tied, theta.
TWINS: tuple[tuple[int, int, int, int, int, bool, float], ...] = (
    (4, 4, 8, 2, 48, True, 10_000.0),
    (3, 1, 16, 2, 64, True, 100_000.0),
    (9, 3, 8, 3, 96, True, 100_000.0),
    (9, 1, 6, 2, 50, False, 130_000.0),
    (6, 2, 10, 1, 37, False, 500.0),
)


@dataclass
class Observation:
    """What a model gives for some ids, by quantity."""

    values: dict[str, Tensor] = field(default_factory=dict)


def reference_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return transformers' LlamaForCausalLM of this architecture, with weights still to be filled."""
    from transformers import LlamaConfig, LlamaForCausalLM

    reference: nn.Module = LlamaForCausalLM(LlamaConfig(**config.to_hf())).to(dtype)
    return reference.eval()


def parity(model: CausalLM, label: str = "") -> list[Check]:
    """Compare a model with the reference that has the same weights: every quantity that training depends on.

    Args:
        model: The model, float32 or bfloat16, on the CPU.
        label: Put in front of the names of the checks.
    """
    dtype = model.lm_head.weight.dtype
    reference = reference_model(model.config, dtype)
    reference.load_state_dict(model.state_dict(), strict=True)
    ids = _ids(model.config)
    ours, theirs = observe_ours(model, ids), observe_reference(reference, ids)
    checks = [] if dtype != torch.float32 else [_greedy(model, reference, ids[:1, :8])]
    exact = observe_reference(reference.double(), ids)
    groups = ("logits", "hidden states", "loss", "gradients")
    compared = [_compare(group, ours, theirs, exact, dtype) for group in groups]
    return [_labelled(check, label) for check in [*compared, *checks]]


def twin_parity(config: ModelConfig) -> list[Check]:
    """Compare small models over many shapes, in float32 and bfloat16, and the last positions of the longest context."""
    checks: list[Check] = []
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        results = [check for shape in TWINS for check in parity(_twin(shape, dtype), _shape_name(shape))]
        failed = [check for check in results if not check.passed]
        measured = f"{len(results) - len(failed)} of {len(results)} comparisons on {len(TWINS)} shapes"
        checks.append(
            Check(
                f"tiny twins, {name}",
                not failed,
                measured,
                "all of them",
                "heads repeated along the wrong axis",
            )
        )
        checks += failed
    return [*checks, _late_positions(config)]


def _labelled(check: Check, label: str) -> Check:
    return (
        check
        if not label
        else Check(f"{label}: {check.name}", check.passed, check.measured, check.expected, check.guards)
    )


def _ids(config: ModelConfig) -> Int[Tensor, "B T"]:
    length = min(24, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(4))


# --- observing -----------------------------------------------------------------------------------------------


@contextmanager
def _recording(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Keep what every block and the final norm give; both implementations have the same module names."""
    wanted = {
        name: module
        for name, module in model.named_modules()
        if name.startswith("model.layers.") and name.count(".") == 2
    }
    wanted["model.norm"] = model.get_submodule("model.norm")

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            values[f"hidden states {name}"] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in wanted.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe_ours(model: CausalLM, ids: Int[Tensor, "B T"]) -> Observation:
    """Return logits, hidden states, loss and gradients as our training computes them."""
    values: dict[str, Tensor] = {}
    was_training = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(requires_grad=True).zero_grad(set_to_none=True)
    with _recording(model, values), torch.enable_grad():
        hidden = model.hidden(ids)
        loss = cross_entropy_sum(hidden[:, :-1], model.lm_head.weight, ids[:, 1:], 16) / ids[:, 1:].numel()
        loss.backward()
    values |= {"loss": loss.detach(), "logits": model.lm_head(hidden).detach()}
    values |= _gradients(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(was_training[name])
    return Observation(values)


def observe_reference(model: Any, ids: Int[Tensor, "B T"]) -> Observation:
    """Return the same of the reference, its loss by its own path (labels shifted inside the model)."""
    values: dict[str, Tensor] = {}
    model.zero_grad(set_to_none=True)
    with _recording(model, values):
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
    values |= {"loss": output.loss.detach(), "logits": output.logits.detach()}
    return Observation(values | _gradients(model))


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {f"gradients {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


# --- comparing -----------------------------------------------------------------------------------------------


def _compare(group: str, ours: Observation, theirs: Observation, exact: Observation, dtype: torch.dtype) -> Check:
    """Compare all quantities of a group; the one that comes closest to its tolerance is reported."""
    names = sorted(name for name in exact.values if name.startswith(group))
    missing = [name for name in names if name not in ours.values]
    if missing or not names:
        return Check(group, False, f"missing: {missing[:2]}", "all of the reference's", "a part that is not there")
    worst_share, text = -1.0, ""
    for name in names:
        yardstick = exact.values[name].double()
        mine = _error(ours.values[name], yardstick)
        other = _error(theirs.values[name], yardstick)
        tolerance = FACTOR * other + ULPS * torch.finfo(dtype).eps * float(yardstick.abs().max())
        share = mine / tolerance if tolerance else float(mine > 0)
        if not share <= worst_share:  # also true for NaN
            worst_share = share
            where = "" if name == group else f" in {name.removeprefix(group).strip()}"
            text = f"error {mine:.1e}{where}; the reference's own {other:.1e}"
    count = f"{len(names)} compared, " if len(names) > 1 else ""
    expected = f"at most {FACTOR:.0f} x the reference's own error against float64, plus {ULPS:.0f} ulp"
    return Check(group, worst_share <= 1.0, count + text, expected, _GUARDS[group])


def _error(value: Tensor, yardstick: Tensor) -> float:
    return float((value.double() - yardstick).abs().max())


_GUARDS = {
    "logits": "anything wrong between ids and logits: rotation, masks, head order, norms",
    "hidden states": "an error that a later layer hides",
    "loss": "labels shifted twice, or not at all",
    "gradients": "a detached branch, a loss that is a mean of means",
}


def _greedy(model: CausalLM, reference: Any, prompt: Int[Tensor, "1 T"]) -> Check:
    """Compare greedy continuations: ours with its cache, the reference's with and without."""
    count = min(GREEDY_TOKENS, model.config.max_position_embeddings - prompt.shape[1])
    ours = list(generate(model, prompt[0].tolist(), Sampling(max_new_tokens=count, temperature=0.0), eos_id=None))
    reference.generation_config.eos_token_id = None
    same = []
    for use_cache in (True, False):
        options = {"max_new_tokens": count, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
        theirs = reference.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[
            0, prompt.shape[1] :
        ].tolist()
        same.append(sum(1 for mine, other in zip(ours, theirs, strict=True) if mine == other))
    measured = f"{same[0]} of {count} equal with the reference's cache, {same[1]} without"
    return Check("greedy tokens", same == [count, count], measured, "all equal", "a cache with wrong positions")


# --- twins ---------------------------------------------------------------------------------------------------


def _twin(shape: tuple[int, int, int, int, int, bool, float], dtype: torch.dtype) -> CausalLM:
    heads, key_value_heads, head_dim, layers, ffn, tied, theta = shape
    config = ModelConfig(
        vocab_size=211, hidden_size=heads * head_dim, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_value_heads, max_position_embeddings=64, rms_norm_eps=1e-5,
        rope_theta=theta, tie_word_embeddings=tied, initializer_range=(heads * head_dim) ** -0.5,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = CausalLM.empty(config)
    model.initialise(seed=heads)
    with torch.no_grad():  # norms of 1 would hide a norm that is applied twice, or not at all
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()))
    return model.to(dtype)


def _shape_name(shape: tuple[int, int, int, int, int, bool, float]) -> str:
    heads, key_value_heads, head_dim, _, _, tied, theta = shape
    return f"{heads}:{key_value_heads} heads of {head_dim}, {'tied' if tied else 'untied'}, theta {theta:g}"


def _late_positions(config: ModelConfig) -> Check:
    """Compare the last positions of the longest context, on a model of one narrow block with this theta."""
    length = min(config.max_position_embeddings, 8192)
    small = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
    }
    twin = CausalLM.empty(config.model_copy(update={**small, "num_key_value_heads": 1, "initializer_range": 0.15}))
    twin.initialise(seed=5)
    reference: Any = reference_model(twin.config)
    reference.load_state_dict(twin.state_dict(), strict=True)
    ids = torch.randint(97, (1, length), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        ours, theirs = twin(ids)[:, -64:], reference(ids).logits[:, -64:]
        exact = reference.double()(ids).logits[:, -64:]
    mine, other = _error(ours, exact), _error(theirs, exact)
    tolerance = FACTOR * other + ULPS * torch.finfo(torch.float32).eps * float(exact.abs().max())
    # The same weights with theta 10000, or with no rotation at all, must be told apart by this very comparison.
    wrong = float((_with_theta(twin, 10_000.0 if config.rope_theta != 10_000 else 500.0, ids) - exact).abs().max())
    measured = f"error {mine:.1e}, the reference's own {other:.1e}; with another theta it would be {wrong:.1e}"
    expected = f"at most {tolerance:.1e} at positions {length - 64} to {length - 1}"
    name = "late positions"
    return Check(
        name,
        mine <= tolerance < wrong,
        measured,
        expected,
        "theta 10000 by default, positions rounded to bfloat16",
    )


def _with_theta(model: CausalLM, theta: float, ids: Int[Tensor, "1 T"]) -> Tensor:
    other = CausalLM.empty(model.config.model_copy(update={"rope_theta": theta}))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        return other(ids)[:, -64:]
