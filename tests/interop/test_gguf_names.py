"""A GGUF file gives the same weights as transformers reads from it, and other models are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from resmol.config.model_config import ModelConfig
from resmol.errors import CheckpointError, ConfigError
from resmol.interop.gguf_header import read_gguf_header
from resmol.interop.gguf_names import BLOCK_NAMES, gguf_config, gguf_tensors

CONFIG = ModelConfig(
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
    adds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
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


def read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    header = read_gguf_header(path)
    return dict(gguf_tensors(path, header, gguf_config(header, str(path))))


def test_float32_weights_come_back_exactly(tmp_path: Path) -> None:
    weights = hf_weights(CONFIG)
    found = read(write_gguf(tmp_path / "x.gguf", CONFIG, weights))
    assert found.keys() == weights.keys()
    for name, values in weights.items():
        assert np.array_equal(found[name], values), name


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0])
def test_dequantised_weights_equal_those_of_transformers(kind: Kind, tmp_path: Path) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write_gguf(tmp_path / "x.gguf", CONFIG, hf_weights(CONFIG), kind)
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig(**CONFIG.to_hf()))
    reference = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton)["tensors"]
    found = read(path)
    assert found.keys() == reference.keys()
    for name, values in found.items():
        assert torch.equal(torch.from_numpy(values), reference[name].float()), name


def test_the_architecture_is_read_from_the_metadata(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", CONFIG, hf_weights(CONFIG))
    assert gguf_config(read_gguf_header(path)) == CONFIG
    untied = CONFIG.model_copy(update={"tie_word_embeddings": False})
    path = write_gguf(tmp_path / "y.gguf", untied, hf_weights(untied))
    assert gguf_config(read_gguf_header(path)) == untied
    assert "lm_head.weight" in read(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "gpt2"}, "architecture is 'gpt2'"),
        ({"llama.rope.freq_base": None}, "llama.rope.freq_base is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"tokenizer.ggml.eos_token_id": None}, "eos_token_id is missing"),
        ({"llama.rope.scaling.type": "linear"}, "rope.scaling.type is 'linear'"),
        ({"llama.rope.scaling.factor": 2.0}, "rope.scaling.factor"),
        ({"llama.expert_count": 8}, "expert_count is '8'"),
        ({"llama.rope.dimension_count": 16}, "dimension_count is 16, not 32"),
        ({"llama.vocab_size": 95}, "vocab_size is 95, not 96"),
        ({"llama.attention.head_count": 7}, "not a multiple"),
        ({"llama.block_count": "2"}, "num_hidden_layers"),
        ({"llama.attention.head_count": 6.0}, "num_attention_heads"),
    ],
)
def test_another_model_is_refused_by_name(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", CONFIG, hf_weights(CONFIG), **changes)
    with pytest.raises(ConfigError, match=r"x\.gguf") as caught:
        gguf_config(read_gguf_header(path), str(path))
    assert reason in caught.value.what


def test_an_end_of_text_of_0_is_an_id_like_any_other(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", CONFIG, hf_weights(CONFIG), **{"tokenizer.ggml.bos_token_id": None})
    assert gguf_config(read_gguf_header(path)).bos_token_id == 0


@pytest.mark.parametrize("wrong", ["missing", "extra", "shape", "layers"])
def test_tensors_that_do_not_fit_are_named(wrong: str, tmp_path: Path) -> None:
    weights, changes = hf_weights(CONFIG), {}
    if wrong == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif wrong == "extra":
        weights["rope_freqs.weight"] = np.ones(16, np.float32)
    elif wrong == "shape":
        weights["model.layers.1.mlp.up_proj.weight"] = np.ones((63, 192), np.float32)
    else:
        changes["llama.block_count"] = 2**31  # the table of names must not be built first
    path = write_gguf(tmp_path / "x.gguf", CONFIG, weights, **changes)
    names = {
        "missing": "mlp.up_proj",
        "extra": "rope_freqs",
        "shape": r"\(63, 192\)",
        "layers": "2147483648 blocks",
    }
    with pytest.raises((CheckpointError, ConfigError), match=names[wrong]):
        read(path)
