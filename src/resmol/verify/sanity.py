"""Properties of a correct model that need no reference."""

from __future__ import annotations

import math
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor

from resmol.checks import Check, largest
from resmol.config.model_config import ModelConfig
from resmol.model.flops import total_parameters
from resmol.model.llama import CausalLM
from resmol.model.shapes import tensor_shapes
from resmol.run.checkpoint import weight_tensors

LOSS_TOKENS = 256
# Published sizes, against which the closed form is checked: by D, F, layers, H, K of a tied model with V = 49,152.
PUBLISHED = {
    (576, 1536, 30, 9, 3): 134_515_008,
    (960, 2560, 32, 15, 5): 361_821_120,
    (2048, 8192, 24, 32, 32): 1_711_376_384,
}


def sanity(config: ModelConfig, model: CausalLM, *, trained: bool) -> list[Check]:
    """Return the checks that need no reference; the two of initial weights only for a model that has them.

    Args:
        config: The architecture at its full depth, at which parameters are counted.
        model: The model for all other checks, of this depth or less.
        trained: The model's weights are not fresh random ones.
    """
    checks = [_parameters(config), _shapes(model), _tying(model), _round_trip(model)]
    if not trained:
        checks += [_initial_std(model), _first_loss(model)]
    return [*checks, _causality(model), _documents(model), _same_in_training(model)]


def finite(model: CausalLM) -> Check:
    """Check that every weight is a number; where one is not, no other check means anything."""
    wrong = ""
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all()):  # NaN wins both ends
            wrong = name
            break
    measured = f"NaN or infinity in {wrong}" if wrong else "every weight is a number"
    guards = "Corrupt weights, or a run that diverged: one NaN makes every logit NaN."
    return Check("finite weights", not wrong, measured, "no NaN, no infinity", guards)


def _parameters(config: ModelConfig) -> Check:
    with torch.device("meta"):  # shapes without memory: 1.7 billion parameters cost nothing here
        counted = sum(p.numel() for p in CausalLM(config).parameters())
    expected, published = total_parameters(config), _published(config)
    return Check(
        "parameters",
        counted == expected and published in (None, expected),
        f"{counted:,}",
        f"{expected:,} by the closed form" + (f", {published:,} as published" if published else ""),
        "A layer too many, biases that SmolLM2 does not have, or a separate output layer: untied, SmolLM2-135M would "
        "have 162,826,560 parameters instead of 134,515,008.",
    )


def _published(config: ModelConfig) -> int | None:
    shape = (config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    heads = (config.num_attention_heads, config.num_key_value_heads)
    return PUBLISHED.get((*shape, *heads)) if config.tie_word_embeddings and config.vocab_size == 49_152 else None


def _shapes(model: CausalLM) -> Check:
    found: dict[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in weight_tensors(model).items()}
    expected = tensor_shapes(model.config)
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    return Check(
        "names and shapes",
        not wrong,
        f"{wrong[0]} is {found.get(wrong[0])}" if wrong else f"{len(found)} tensors",
        f"{len(expected)} tensors with the names and shapes of a Hugging Face file",
        "Prefixes such as `_orig_mod.` or `module.` in the names, transposed matrices, an output layer in the file "
        "of a tied model.",
    )


def _tying(model: CausalLM) -> Check:
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    same, wanted = head is embedding and head.data_ptr() == embedding.data_ptr(), model.config.tie_word_embeddings
    return Check(
        "tying",
        same == wanted,
        "one tensor" if same else "two tensors",
        "one tensor" if wanted else "two tensors",
        "An output layer that is a copy of the embeddings: equal at first, it drifts away with the first step.",
    )


def _round_trip(model: CausalLM) -> Check:
    weights = {name: tensor.detach().contiguous() for name, tensor in weight_tensors(model).items()}
    back = safetensors.torch.load(safetensors.torch.save(weights))
    changed = [name for name, tensor in weights.items() if name not in back or not _same_bits(tensor, back[name])]
    return Check(
        "round trip",
        not changed and back.keys() == weights.keys(),
        f"{changed[0]} changed" if changed else f"{len(back)} tensors, bit for bit",
        "a state dict that goes through safetensors comes back with the same bits",
        "Weights that are cast to half precision before they are saved: a run resumed from them is another run.",
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _initial_std(model: CausalLM) -> Check:
    """Compare each matrix's standard deviation with its rule; 6 standard errors of a sample of n are 6 / sqrt(2n)."""
    base = model.config.initializer_range
    residual = base / math.sqrt(2 * model.config.num_hidden_layers)
    worst, name_of_worst = -1.0, ""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        wanted = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else base
        deviation = abs(float(parameter.detach().std()) / wanted - 1) * math.sqrt(2 * parameter.numel())
        if not deviation <= worst:
            worst, name_of_worst = deviation, name
    return Check(
        "initial weights",
        worst < 6,
        f"largest deviation {worst:.1f} standard errors ({name_of_worst})",
        f"within 6 of std {base:.4f}; of {residual:.4f} for o_proj and down_proj, which add to the residual stream",
        "No initialization, a copied 0.02, or N(0, 1): the run starts badly and nothing says why.",
    )


@torch.no_grad()
def _first_loss(model: CausalLM) -> Check:
    """Compare with ln V plus half the variance of the logits: ``E[log sum exp]`` of V normal numbers.

    The norm in front of the output layer gives D numbers of mean square 1, so the variance is D x std^2. The mean over
    N random targets has a standard error of ``sqrt(variance / N)``. Allowed are six of them, plus 0.2 for tied models,
    whose hidden states still contain the input token's embedding.
    """
    config = model.config
    length = max(1, min(64, config.max_position_embeddings - 1))
    count = max(1, LOSS_TOKENS // length)
    ids = torch.randint(config.vocab_size, (count, length + 1), generator=torch.Generator().manual_seed(1))
    total = model.loss(ids[:, :-1], ids[:, 1:])
    loss, uniform = float(total) / ids[:, 1:].numel(), math.log(config.vocab_size)
    variance = config.hidden_size * config.initializer_range**2
    allowed = 6 * math.sqrt(variance / ids[:, 1:].numel()) + 0.2
    expected = uniform + variance / 2
    return Check(
        "first loss",
        abs(loss - expected) <= allowed,
        f"{loss:.3f}",
        f"{expected:.2f} +- {allowed:.2f}: ln V = {uniform:.2f}, plus half the variance of the logits ({variance:.2f})",
        "Embeddings drawn from N(0, 1) (the loss starts near 66 instead of 11), or weights that are not random at all.",
    )


def _leaks(
    model: CausalLM, ids: Int[Tensor, "B T"], positions: list[int], documents: Int[Tensor, "B T"] | None
) -> Float[Tensor, "B T"]:
    """Return how much the hidden state of row b at ``positions[b]`` depends on the embedding at each position."""
    embedded: list[Tensor] = []

    def detach(_module: torch.nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = model.model.embed_tokens.register_forward_hook(detach)
    try:
        with torch.enable_grad():
            hidden = model.hidden(ids, documents)[torch.arange(len(ids)), torch.tensor(positions)]
            weights = torch.linspace(1.0, 2.0, hidden.shape[-1], dtype=hidden.dtype)  # a plain sum could cancel
            (gradient,) = torch.autograd.grad((hidden * weights).sum(), embedded[0])
    finally:
        handle.remove()
    return gradient.abs().amax(-1)


def _causality(model: CausalLM) -> Check:
    positions = [0, 5, 10]
    depends = _leaks(model, _ids(model, rows=3), positions, None)
    later = largest(float(row[position + 1 :].max()) for row, position in zip(depends, positions, strict=True))
    earlier = -largest(-float(row[: position + 1].min()) for row, position in zip(depends, positions, strict=True))
    return Check(
        "causality",
        later == 0 and earlier > 0,
        f"gradient to later tokens {later:g}, to earlier ones at least {earlier:.1e}",
        "exactly 0, and more than 0",
        "No causal mask, or an inverted one: the model reads the answer, the loss falls to 0, and generation is noise.",
    )


def _documents(model: CausalLM) -> Check:
    documents = torch.tensor([[0] * 5 + [1] * 7])
    depends = _leaks(model, _ids(model, rows=1), [9], documents)[0]
    other, later = float(depends[:5].max()), float(depends[10:].max())
    own = float(depends[5:10].min())
    return Check(
        "document mask",
        other == 0 and later == 0 and own > 0,
        f"gradient to the other document {other:g}, to later tokens {later:g}, within its own at least {own:.1e}",
        "exactly 0 twice, and more than 0",
        "A document mask that is inverted or ignored: unrelated texts are read as one.",
    )


@torch.no_grad()
def _same_in_training(model: CausalLM) -> Check:
    """Evaluation and training mode must give the same bits, and draw no random number."""
    ids, mode, generator = _ids(model, rows=1), model.training, torch.get_rng_state()
    training, evaluation = (model.train(mode=is_training)(ids) for is_training in (True, False))
    model.train(mode)
    same, untouched = torch.equal(training, evaluation), torch.equal(generator, torch.get_rng_state())
    return Check(
        "training mode",
        same and untouched,
        f"{'the same bits' if same else 'other logits'} as in evaluation mode; "
        f"the random generator was {'left alone' if untouched else 'used'}",
        "the same bits, and no random number drawn",
        "Dropout, which SmolLM2 does not have, in training or even in evaluation; a forward pass that draws random "
        "numbers.",
    )


def _ids(model: CausalLM, rows: int) -> Int[Tensor, "B 12"]:
    return (torch.arange(1, 13) % model.config.vocab_size).expand(rows, 12)
