"""A GGUF file gives the same weights as transformers reads from it, and other models are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from small_models import GGUF_CONFIG, hf_weights, write_gguf

from resmol.errors import CheckpointError, ConfigError
from resmol.interop.gguf_header import read_gguf_header
from resmol.interop.gguf_names import gguf_config, gguf_tensors

Kind = gguf.GGMLQuantizationType


def read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    header = read_gguf_header(path)
    return dict(gguf_tensors(path, header, gguf_config(header, str(path))))


def test_float32_weights_come_back_exactly(tmp_path: Path) -> None:
    weights = hf_weights(GGUF_CONFIG)
    found = read(write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, weights))
    assert found.keys() == weights.keys()
    for name, values in weights.items():
        assert np.array_equal(found[name], values), name


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0])
def test_dequantised_weights_equal_those_of_transformers(kind: Kind, tmp_path: Path) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG), kind)
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig(**GGUF_CONFIG.to_hf()))
    reference = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton)["tensors"]
    found = read(path)
    assert found.keys() == reference.keys()
    for name, values in found.items():
        assert torch.equal(torch.from_numpy(values), reference[name].float()), name


def test_the_architecture_is_read_from_the_metadata(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG))
    assert gguf_config(read_gguf_header(path)) == GGUF_CONFIG
    untied = GGUF_CONFIG.model_copy(update={"tie_word_embeddings": False})
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
    path = write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG), **changes)
    with pytest.raises(ConfigError, match=r"x\.gguf") as caught:
        gguf_config(read_gguf_header(path), str(path))
    assert reason in caught.value.what


def test_an_end_of_text_of_0_is_an_id_like_any_other(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG), **{"tokenizer.ggml.bos_token_id": None}
    )
    assert gguf_config(read_gguf_header(path)).bos_token_id == 0


@pytest.mark.parametrize("wrong", ["missing", "extra", "shape", "layers"])
def test_tensors_that_do_not_fit_are_named(wrong: str, tmp_path: Path) -> None:
    weights, changes = hf_weights(GGUF_CONFIG), {}
    if wrong == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif wrong == "extra":
        weights["rope_freqs.weight"] = np.ones(16, np.float32)
    elif wrong == "shape":
        weights["model.layers.1.mlp.up_proj.weight"] = np.ones((63, 192), np.float32)
    else:
        changes["llama.block_count"] = 2**31  # the table of names must not be built first
    path = write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, weights, **changes)
    names = {
        "missing": "mlp.up_proj",
        "extra": "rope_freqs",
        "shape": r"\(63, 192\)",
        "layers": "2147483648 blocks",
    }
    with pytest.raises((CheckpointError, ConfigError), match=names[wrong]):
        read(path)
