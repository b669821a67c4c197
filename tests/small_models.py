"""Small models in other formats: of transformers, and GGUF files as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from resmol.config.model_config import ModelConfig
from resmol.interop.gguf_names import BLOCK_NAMES

GGUF_CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=192,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    tie_word_embeddings=True,
    initializer_range=0.02,
    bos_token_id=0,
    eos_token_id=0,
)
Kind = gguf.GGMLQuantizationType


def reference(**changes: Any) -> Any:
    """A small model of transformers, 3:1 heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}
    ids = {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"},
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(shape | heads | ids | changes)))


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The order of rows that llama.cpp's converter writes."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def hf_weights(config: ModelConfig, *, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Random weights under Hugging Face's names, shapes taken from transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        reference = LlamaForCausalLM(LlamaConfig(**config.to_hf()))
    names = {name: p.shape for name, p in reference.named_parameters()}
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal(tuple(shape), dtype=np.float32) for name, shape in names.items()}


def write_gguf(
    path: Path,
    config: ModelConfig,
    weights: dict[str, np.ndarray[Any, Any]],
    kind: Kind = Kind.F32,
    **changes: Any,
) -> Path:
    """Write a GGUF file as llama.cpp's converter does; ``changes`` replace or (None) leave out metadata."""
    metadata = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
    } | changes
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    adds = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        if value is not None:
            adds[type(value)](key, value)
    names = {f"model.{hf}": theirs for hf, theirs in (("embed_tokens", "token_embd"), ("norm", "output_norm"))}
    names["lm_head"] = "output"
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{hf}": f"blk.{layer}.{theirs}" for theirs, hf in BLOCK_NAMES.items()}
    for name, weight in weights.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        values = weight if heads is None else permuted(weight, heads)
        used = Kind.F32 if values.ndim == 1 else kind
        theirs = names.get(name.removesuffix(".weight"), name.removesuffix(".weight"))
        writer.add_tensor(f"{theirs}.weight", gguf.quants.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
