"""What a correct model must satisfy by itself, whatever any reference says."""

from __future__ import annotations

import math

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from resmol.checkpoint import weight_tensors
from resmol.checks import Check
from resmol.flops import total_parameters
from resmol.hf_config import ModelConfig
from resmol.kv_cache import KVCache
from resmol.loss import cross_entropy_sum
from resmol.model import CausalLM, rotate, rotation_tables

LOSS_TOKENS = 512
LOSS_TOLERANCE = 0.6


def sanity(model: CausalLM, *, trained: bool) -> list[Check]:
    """Return the checks that need no reference; the two about initial weights are left out for trained ones."""
    checks = [_finite(model), _parameters(model), _shapes(model), _tying(model), _round_trip(model)]
    if not trained:
        checks += [_initial_std(model), _first_loss(model)]
    return [*checks, _causality(model), _documents(model), *_rotation(model.config), _cache(model)]


def _finite(model: CausalLM) -> Check:
    wrong = [name for name, tensor in model.state_dict().items() if not bool(torch.isfinite(tensor).all())]
    measured = f"NaN or infinity in {wrong[0]}" if wrong else "every weight is a number"
    return Check("finite weights", not wrong, measured, "no NaN, no infinity", "weights damaged on the way")


def _parameters(model: CausalLM) -> Check:
    counted, expected = sum(p.numel() for p in model.parameters()), total_parameters(model.config)
    guards = "a layer too many, biases, or an output layer of its own (162,826,560 instead of 134,515,008)"
    return Check("parameters", counted == expected, f"{counted:,}", f"{expected:,} by the closed form", guards)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight in a Hugging Face file of this architecture."""
    width, ffn = config.hidden_size, config.intermediate_size
    narrow = config.num_key_value_heads * config.head_dim
    block = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (ffn, width),
        "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn),
    }
    layers = range(config.num_hidden_layers)
    shapes = {f"model.layers.{index}.{name}.weight": shape for index in layers for name, shape in block.items()}
    shapes |= {"model.embed_tokens.weight": (config.vocab_size, width), "model.norm.weight": (width,)}
    return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": (config.vocab_size, width)}


def _shapes(model: CausalLM) -> Check:
    found = {name: tuple(tensor.shape) for name, tensor in weight_tensors(model).items()}
    expected = expected_shapes(model.config)
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    measured = f"{wrong[0]} is {found.get(wrong[0])}" if wrong else f"{len(found)} tensors"
    return Check(
        "names and shapes",
        not wrong,
        measured,
        f"{len(expected)} as in a Hugging Face file",
        "prefixes, transposed matrices",
    )


def _tying(model: CausalLM) -> Check:
    same = model.lm_head.weight is model.model.embed_tokens.weight
    wanted = model.config.tie_word_embeddings
    measured = "one tensor" if same else "two tensors"
    expected = "one tensor" if wanted else "two tensors"
    return Check("tying", same == wanted, measured, expected, "an output layer that is a copy and drifts away")


def _round_trip(model: CausalLM) -> Check:
    weights = weight_tensors(model)
    back = safetensors.torch.load(safetensors.torch.save({name: t.contiguous() for name, t in weights.items()}))
    changed = [name for name, tensor in weights.items() if not torch.equal(tensor, back[name])]
    measured = f"{changed[0]} changed" if changed else f"{len(back)} tensors, bit for bit"
    return Check("checkpoint round trip", not changed, measured, "the same bits", "weights cast to half before saving")


def _initial_std(model: CausalLM) -> Check:
    """Compare each matrix's standard deviation with its rule; 6 standard errors of a sample of n are 6 / sqrt(2n)."""
    base = model.config.initializer_range
    worst, name_of_worst = 0.0, ""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        scaled = name.endswith(("o_proj.weight", "down_proj.weight"))
        wanted = base / math.sqrt(2 * model.config.num_hidden_layers) if scaled else base
        deviation = abs(float(parameter.detach().std()) / wanted - 1) * math.sqrt(2 * parameter.numel())
        if deviation > worst:
            worst, name_of_worst = deviation, name
    measured = f"largest deviation {worst:.1f} standard errors ({name_of_worst})"
    expected = f"within 6 of {base:.4f}, or of {base:.4f}/sqrt(2 x layers) for o_proj and down_proj"
    return Check("initial weights", worst < 6, measured, expected, "no initialisation, 0.02, or N(0, 1)")


@torch.no_grad()
def _first_loss(model: CausalLM) -> Check:
    generator = torch.Generator().manual_seed(1)
    length = min(128, model.config.max_position_embeddings - 1)
    ids = torch.randint(model.config.vocab_size, (LOSS_TOKENS // length, length + 1), generator=generator)
    total = cross_entropy_sum(model.hidden(ids[:, :-1]), model.lm_head.weight, ids[:, 1:])
    loss, uniform = float(total) / ids[:, 1:].numel(), math.log(model.config.vocab_size)
    measured = f"{loss:.3f}"
    expected = f"ln V = {uniform:.2f} +- {LOSS_TOLERANCE} (logits of unit variance add about 0.5)"
    guards = "embeddings N(0, 1) (loss near 66), or weights that are not random"
    return Check("first loss", abs(loss - uniform) <= LOSS_TOLERANCE, measured, expected, guards)


def _leaks(model: CausalLM, position: int, documents: Tensor | None) -> Float[Tensor, " T"]:
    """Return how much the hidden state at ``position`` depends on the embedding at each position."""
    ids = torch.arange(1, 13)[None] % model.config.vocab_size
    found: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: object, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[0]

    handle = model.model.embed_tokens.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            hidden = model.hidden(ids, documents)[0, position]
            (gradient,) = torch.autograd.grad((hidden * torch.arange(1.0, len(hidden) + 1)).sum(), found[0])
    finally:
        handle.remove()
    return gradient[0].abs().amax(-1)


def _causality(model: CausalLM) -> Check:
    leaks = [float(_leaks(model, position, None)[position + 1 :].max()) for position in (0, 5, 10)]
    past = float(_leaks(model, 10, None)[:10].min())
    measured = f"gradient to later tokens {max(leaks):g}, to earlier ones at least {past:.1e}"
    expected = "exactly 0, and more than 0"
    return Check("causality", max(leaks) == 0 and past > 0, measured, expected, "no mask: the model reads the answer")


def _documents(model: CausalLM) -> Check:
    documents = torch.tensor([[0] * 5 + [1] * 7])
    depends = _leaks(model, 9, documents)
    other, own = float(depends[:5].max()), float(depends[5:10].min())
    measured = f"gradient to the other document {other:g}, within the own one at least {own:.1e}"
    return Check("document mask", other == 0 and own > 0, measured, "exactly 0, and more than 0", "an inverted mask")


def _rotation(config: ModelConfig) -> list[Check]:
    """Rotary embeddings keep lengths, and the score of a query and a key depends on their distance alone."""
    generator = torch.Generator().manual_seed(2)
    query, key = torch.randn(2, config.head_dim, generator=generator, dtype=torch.float64)
    last = config.max_position_embeddings - 1
    starts = sorted({min(start, last - 7) for start in (0, 1, 300, 2500, last - 7) if last >= 7})

    def turned(vector: Tensor, position: int) -> Tensor:
        tables = rotation_tables(torch.tensor([position]), config.head_dim, config.rope_theta)
        return rotate(vector[None, None, None], tables)[0, 0, 0]

    stretch = max(abs(float(turned(query, s).norm() / query.norm()) - 1) for s in starts)
    scores = [float(turned(query, start + 7) @ turned(key, start)) for start in starts]
    spread = max(scores) - min(scores)
    moved = float((turned(query, 1) - query).norm() / query.norm())
    # An angle of p radians is rounded to p x 2^-24 in float32, and the score is bilinear in the two vectors.
    tolerance = 4 * (last + 1) * 2.0**-24 * float(query.norm() * key.norm())
    return [
        Check(
            "rotation keeps lengths", stretch < 1e-6 and moved > 0.01,
            f"stretch {stretch:.1e}, position 1 moves by {moved:.2f}",
            "below 1e-6 (float32 tables), and positions do turn", "interleaved rotation with half-split tables",
        ),
        Check(
            "rotation is relative", spread <= tolerance, f"spread {spread:.1e} at positions {starts}",
            f"at most {tolerance:.1e}: the rounding of float32 angles", "positions on the wrong axis, or in bfloat16",
        ),
    ]  # fmt: skip


@torch.no_grad()
def _cache(model: CausalLM) -> Check:
    ids = torch.arange(3, 19)[None] % model.config.vocab_size
    whole = model.hidden(ids)
    cache = KVCache(model.config, 1, ids.shape[1], whole.dtype)
    parts = torch.cat([model.hidden(part, cache=cache) for part in ids.split([9, 1, 3, 1, 2], dim=1)], dim=1)
    difference, scale = float((parts - whole).abs().max()), float(whole.abs().max())
    tolerance = 64 * torch.finfo(whole.dtype).eps * scale * math.sqrt(model.config.num_hidden_layers)
    expected = f"at most {tolerance:.1e}: other shapes round in another order"
    return Check(
        "key/value cache",
        difference <= tolerance,
        f"difference {difference:.1e}",
        expected,
        "wrong positions after the prompt",
    )
