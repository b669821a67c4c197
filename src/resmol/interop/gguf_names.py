"""Translate names and fields between GGUF and Hugging Face, and read a file's weights as float32; no PyTorch.

GGUF has the rows of the query and key projections in another order, because llama.cpp rotates neighbouring
pairs where Hugging Face's layout rotates ``(i, i + Dh/2)``. `permuted` is that order; `unpermuted` turns it back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from resmol.config.model_config import ModelConfig
from resmol.errors import CheckpointError, ConfigError
from resmol.interop.gguf_header import GGUFHeader, GGUFTensor
from resmol.model.shapes import tensor_shapes
from resmol.system.safetensors_header import TensorInfo

# GGUF name of a part of a block -> Hugging Face's.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GGUF_NAMES = {theirs: name for name, theirs in (BLOCK_NAMES | OUTER_NAMES).items()}

# Metadata key (after "llama.") -> field of the architecture.
_FIELDS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_HEAD_DIMS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
DEFAULT_THETA = 10_000.0  # of llama.cpp and transformers for a file without rope.freq_base: that of Llama 1 and 2
# Fields that change nothing with these values (llama.cpp: llama-model.cpp, llama-hparams.h).
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scale_linear": (0, 1),
    "tensor_data_layout": ("Meta AI original pth",),  # the order of query and key rows that all such files have
    "use_parallel_residual": (False,),
}
_SCALING = "rope.scaling."
_ROTARY = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")


def gguf_config(header: GGUFHeader, origin: str = "the file") -> ModelConfig:
    """Derive the architecture from the metadata of a GGUF file.

    Raises:
        ConfigError: It is another architecture than llama, or a field is missing, unknown or contradictory.
    """
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise _unsupported(origin, [f"its architecture is {architecture!r}; only 'llama' is implemented"])
    stated = {key.removeprefix("llama."): _one(value) for key, value in metadata.items() if key.startswith("llama.")}
    stated.setdefault("attention.head_count_kv", stated.get("attention.head_count"))
    stated.setdefault("rope.freq_base", DEFAULT_THETA)
    problems = [f"llama.{key} is missing" for key in _FIELDS if stated.get(key) is None]
    problems += _tokenizer_problems(metadata) + _unsupported_fields(stated)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        problems.append("the tensor token_embd.weight is missing")
    if problems or embedding is None:
        raise _unsupported(origin, problems)
    eos = metadata["tokenizer.ggml.eos_token_id"]
    values = {field: stated[key] for key, field in _FIELDS.items()} | {
        "rms_norm_eps": _shortest(stated["attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(stated["rope.freq_base"]),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "initializer_range": 0.02,  # not in the format and not used: the weights are given
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", eos),
        "eos_token_id": eos,
    }
    try:
        config = ModelConfig.model_validate(values)
    except ValueError as error:  # pydantic's error is one
        raise _unsupported(origin, [str(error).replace("\n", " ")[:300]]) from None
    _check_sizes(config, stated, origin)
    return config


def gguf_metadata(config: ModelConfig) -> dict[str, int | float]:
    """Return the fields of a GGUF file that describe an architecture: the inverse of `gguf_config`."""
    fields = {f"llama.{key}": getattr(config, field) for key, field in _FIELDS.items()}
    return fields | {f"llama.{_HEAD_DIMS[0]}": config.head_dim, "llama.vocab_size": config.vocab_size}


def _tokenizer_problems(metadata: dict[str, Any]) -> list[str]:
    known = "tokenizer.ggml.eos_token_id" in metadata
    return [] if known else ["tokenizer.ggml.eos_token_id is missing: where a text ends would be a guess"]


def gguf_ends(header: GGUFHeader) -> tuple[int, ...]:
    """Return the tokens that end a text: of the text itself, of a turn, of a message; llama.cpp ends at each."""
    ids = [header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(token for token in ids if type(token) is int))


def gguf_notes(header: GGUFHeader) -> tuple[str, ...]:
    """Return sentences about what a file leaves to be assumed."""
    if "llama.rope.freq_base" in header.metadata:
        return ()
    return (
        f"the file states no llama.rope.freq_base; theta is {DEFAULT_THETA:,.0f}, as in llama.cpp and transformers",
    )


def _one(value: Any) -> Any:
    """Return a number that a file repeats for every block."""
    return value[0] if isinstance(value, list) and value and all(item == value[0] for item in value) else value


def _unsupported_fields(stated: dict[str, Any]) -> list[str]:
    """Return the fields that could change the numbers and are not implemented; neutral ones may stay."""
    harmless = {*_FIELDS, *_HEAD_DIMS, "vocab_size"}
    return [
        f"llama.{key} is {str(value)[:40]!r}, which is not implemented"
        for key, value in stated.items()
        if key not in harmless and not _is_neutral(key, value, stated)
    ]


def _is_neutral(key: str, value: Any, stated: dict[str, Any]) -> bool:
    if key.startswith(_SCALING):
        return _scales_nothing(stated)
    if key == "attention.scale":  # of the scores; 0 stands for the usual 1 / sqrt(Dh)
        return value == 0 or _is_usual_scale(value, stated.get("embedding_length"), stated.get("attention.head_count"))
    return value in _NEUTRAL.get(key, ())


def _is_usual_scale(value: Any, width: Any, heads: Any) -> bool:
    numbers = all(isinstance(number, int | float) and number > 0 for number in (value, width, heads))
    return numbers and math.isclose(value, (width / heads) ** -0.5, rel_tol=1e-6)


def _scales_nothing(stated: dict[str, Any]) -> bool:
    """Return whether rope scaling is off: by its type, or since its factor is 1 (0 stands for none)."""
    scaling = {key.removeprefix(_SCALING): value for key, value in stated.items() if key.startswith(_SCALING)}
    if scaling.get("type") == "none":
        return True
    known = {"type", "factor", "attn_factor", "original_context_length", "finetuned"}
    return (
        scaling.get("type", "linear") in ("linear", "yarn")
        and scaling.get("factor", 1) in (0, 1)
        and scaling.get("attn_factor", 1) == 1
        and scaling.get("original_context_length") in (None, 0, stated.get("context_length"))
        and all(name in known or name.startswith("yarn_") for name in scaling)
    )


def _check_sizes(config: ModelConfig, stated: dict[str, Any], origin: str) -> None:
    wanted = dict.fromkeys(_HEAD_DIMS, config.head_dim) | {"vocab_size": config.vocab_size}
    problems = [
        f"llama.{key} is {stated[key]}, not {size}" for key, size in wanted.items() if stated.get(key, size) != size
    ]
    if problems:
        raise _unsupported(origin, problems)


def _shortest(value: Any) -> Any:
    """Return the shortest decimal that is the same single: the file's 9.99999974e-06 was written as 1e-05."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _unsupported(origin: str, problems: list[str]) -> ConfigError:
    return ConfigError(
        f"{origin} does not hold a model that resmol implements:\n" + "\n".join(f"  - {text}" for text in problems),
        fix="use a GGUF file of a Llama-family base model, such as SmolLM2's",
    )


def hf_name(name: str) -> str:
    """Return Hugging Face's name of a GGUF tensor; a name without a counterpart is returned unchanged."""
    stem = name.removesuffix(".weight")
    prefix, _, part = stem.removeprefix("blk.").partition(".")
    if stem.startswith("blk.") and prefix.isdecimal() and part in BLOCK_NAMES:
        return f"model.layers.{prefix}.{BLOCK_NAMES[part]}.weight"
    return f"{OUTER_NAMES[stem]}.weight" if stem in OUTER_NAMES else name


def gguf_name(name: str) -> str:
    """Return the GGUF name of a tensor of `tensor_shapes`: the inverse of `hf_name`."""
    stem = name.removesuffix(".weight")
    prefix, _, rest = stem.removeprefix("model.layers.").partition(".")
    if stem.startswith("model.layers."):
        return f"blk.{prefix}.{_GGUF_NAMES[rest]}.weight"
    return f"{_GGUF_NAMES[stem]}.weight"


def gguf_tensor_infos(header: GGUFHeader) -> dict[str, TensorInfo]:
    """Return Hugging Face's name, the GGUF type and the shape of each weight; rotary tables are none."""
    return {
        hf_name(name): TensorInfo(tensor.kind, tensor.shape, tensor.start, tensor.end)
        for name, tensor in header.tensors.items()
        if not _ROTARY.fullmatch(name)
    }


def gguf_tensors(header: GGUFHeader, config: ModelConfig) -> Iterator[tuple[str, Float32[np.ndarray, ...]]]:
    """Yield Hugging Face's name and the values of each weight, one at a time, over all parts of the model.

    Raises:
        CheckpointError: Names or shapes are not those of ``config``, or a rotary table scales the rotation.
    """
    _check_table(header, config)
    for number, path in enumerate(header.files):
        own = {name: tensor for name, tensor in header.tensors.items() if tensor.part == number}
        if not own:  # the first part may hold the metadata alone
            continue
        with path.open("rb") as file:
            for name, tensor in own.items():
                file.seek(tensor.start)
                raw = np.frombuffer(file.read(tensor.end - tensor.start), dtype=np.uint8)
                values = _dequantised(raw, tensor).reshape(tensor.shape)
                if _ROTARY.fullmatch(name):
                    _check_rotary(path, name, values, config)
                else:
                    yield hf_name(name), unpermuted(values, rotated_heads(name, config))


def _check_table(header: GGUFHeader, config: ModelConfig) -> None:
    expected = tensor_shapes(config)
    names = [name for name in header.tensors if not _ROTARY.fullmatch(name)]
    found = {hf_name(name): header.tensors[name].shape for name in names}
    if found != expected or len(found) != len(names):
        wrong = min({*found, *expected}, key=lambda name: (found.get(name) == expected.get(name), name))
        raise CheckpointError(
            f"{header.files[0]} holds {wrong!r} as {found.get(wrong)}; its own metadata asks for {expected.get(wrong)}",
            fix="fetch or convert the file again",
        )


def _check_rotary(path: Path, name: str, values: Float32[np.ndarray, ...], config: ModelConfig) -> None:
    """Refuse divisors of the frequencies (rope_freqs) that are not 1, and frequencies that are not theta's."""
    wanted = np.ones(config.head_dim // 2)
    if not name.startswith("rope_freqs"):
        wanted = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if values.shape != wanted.shape or not np.allclose(values, wanted, rtol=1e-3):
        raise CheckpointError(
            f"{path} scales the rotation by the tensor {name}, which is not implemented",
            fix="use a GGUF file of a model without rope scaling, such as SmolLM2's",
        )


def _dequantised(raw: np.ndarray[Any, np.dtype[np.uint8]], tensor: GGUFTensor) -> Float32[np.ndarray, ...]:
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType(tensor.type_number)
    if tensor.kind in ("F32", "F16"):  # the package leaves these two to the caller's view of the bytes
        return raw.view(np.float32 if tensor.kind == "F32" else np.float16).astype(np.float32)
    rows = raw.reshape(*tensor.shape[:-1], -1)
    return np.ascontiguousarray(quants.dequantize(rows, kind), dtype=np.float32)


def rotated_heads(name: str, config: ModelConfig) -> int:
    """Return by how many heads the rows of a GGUF tensor are reordered, 0 where they are Hugging Face's."""
    if name.endswith(".attn_q.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith(".attn_k.weight") else 0


def unpermuted(values: Float32[np.ndarray, "*shape"], heads: int) -> Float32[np.ndarray, "*shape"]:
    """Put the rows of a projection back into Hugging Face's order; with 0 heads, leave them as they are.

    In GGUF a head's rows are (0, Dh/2, 1, Dh/2 + 1, ...): the two halves of the head, interleaved.
    """
    if heads == 0:
        return values
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def permuted(values: Float32[np.ndarray, "*shape"], heads: int) -> Float32[np.ndarray, "*shape"]:
    """Put the rows of a projection into GGUF's order: the inverse of `unpermuted`."""
    if heads == 0:
        return values
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
