"""Derive a model from its weight file alone, and list the questions that even weights and configuration leave open.

Each open question has the experiment that settles it; `resmol verify` does those experiments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resmol.system.safetensors_header import TensorInfo


@dataclass(frozen=True)
class OpenQuestion:
    """A question that names, shapes and configuration do not settle.

    Attributes:
        what: The question.
        experiment: The experiment that settles it.
    """

    what: str
    experiment: str


# Two models can have equal config.json files and equal tensor tables, and still differ in each of these.
LEFT_OPEN = (
    OpenQuestion(
        "layout of the rotary pairs: (i, i + Dh/2) or (2i, 2i + 1)",
        "logits against the reference at positions > 0; both layouts keep lengths, only one gives the logits",
    ),
    OpenQuestion(
        "place of the norm's epsilon: inside the root or outside",
        "scale the embeddings by 1e-3 and compare hidden states: then the two differ by a factor",
    ),
    OpenQuestion(
        "arithmetic of the norms: float32, or that of the weights",
        "run in bfloat16 and compare the error against float64 with the reference's own",
    ),
    OpenQuestion(
        "scale of the attention scores: 1/sqrt(Dh), once",
        "logits against the reference; without it the softmax saturates and the loss rises",
    ),
    OpenQuestion(
        "place of the norms: before each layer, after it, or both",
        "hidden state of each layer against the reference; the first one already differs",
    ),
    OpenQuestion(
        "which of gate_proj and up_proj goes through silu",
        "exchange the two and compare logits: their shapes are equal, silu(a) b is not a silu(b)",
    ),
    OpenQuestion(
        "which query heads share a key/value head: neighbours, or every K-th",
        "logits against the reference with K > 1; the shapes allow both",
    ),
)
# With a weight file alone, these are open as well.
LEFT_OPEN_WITHOUT_CONFIG = (
    OpenQuestion("base of the rotation (rope theta)", "config.json; or the theta with the lowest loss on long text"),
    OpenQuestion("epsilon of the norms", "config.json; 1e-5 and 1e-6 differ in the last digits of the logits"),
    OpenQuestion("activation of the gate", "config.json; or the one with the lowest loss on text"),
    OpenQuestion("longest context", "config.json; or the position from which the loss rises"),
    OpenQuestion("ids of bos and eos", "config.json and tokenizer.json"),
)


def derive(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return the fields of config.json that the names and shapes of a weight file determine.

    A value is None where the tensor that determines it is missing.
    """
    rows, columns = _shape(tensors, "model.embed_tokens.weight")
    layers = {int(match[1]) for name in tensors if (match := re.match(r"model\.layers\.(\d{1,6})\.", name))}
    return {
        "vocab_size": rows,
        "hidden_size": columns,
        "intermediate_size": _shape(tensors, "model.layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": len(layers) if layers == set(range(len(layers))) else None,
        "key_value_width": _shape(tensors, "model.layers.0.self_attn.k_proj.weight")[0],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "biases": sorted({name.split(".")[-2] for name in tensors if name.endswith(".bias")}),
        "dtypes": sorted({info.dtype for info in tensors.values()}),
        "tensors": len(tensors),
    }


def _shape(tensors: Mapping[str, TensorInfo], name: str) -> tuple[int | None, int | None]:
    shape = tensors[name].shape if name in tensors else ()
    return (shape[0], shape[1]) if len(shape) == 2 else (None, None)


def parameters_by_part(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Return the parameters of each part, by the names of the tensors."""
    parts = {
        "embedding": "embed_tokens",
        "attention": "self_attn",
        "mlp": "mlp",
        "norms": "norm",
        "lm_head": "lm_head",
    }
    counts = dict.fromkeys([*parts, "other"], 0)
    for name, info in tensors.items():
        part = next((part for part, word in parts.items() if word in name), "other")
        counts[part] += math.prod(info.shape)
    return {part: count for part, count in counts.items() if count or part != "other"}


def left_open_by_weights(tensors: Mapping[str, TensorInfo]) -> tuple[OpenQuestion, ...]:
    """Return the questions that a weight file without a configuration leaves open."""
    return _head_question(tensors) + LEFT_OPEN_WITHOUT_CONFIG + LEFT_OPEN


def _head_question(tensors: Mapping[str, TensorInfo]) -> tuple[OpenQuestion, ...]:
    known = derive(tensors)
    width, key_value = known["hidden_size"], known["key_value_width"]
    if not width or not key_value:
        return ()
    common = math.gcd(width, key_value)
    sizes = [size for size in (32, 64, 96, 128) if common % size == 0]
    splits = ", ".join(f"{width // size} : {key_value // size} heads of {size}" for size in sizes) or "many splits"
    return (
        OpenQuestion(f"how the heads are split: {splits}", "config.json; or the split with the lowest loss on text"),
    )
