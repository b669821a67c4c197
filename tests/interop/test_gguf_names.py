"""A GGUF file gives the same weights as transformers reads from it, and other models are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from small_models import GGUF_CONFIG, hf_weights, write_gguf
from transformers.integrations.gguf.dequant import GGML_NAME, dequantize

from resmol.errors import CheckpointError, ConfigError
from resmol.interop import gguf_names
from resmol.interop.gguf_header import GGUFTensor, read_gguf_header, readable_types
from resmol.interop.gguf_names import gguf_config, gguf_ends, gguf_notes, gguf_tensors

Kind = gguf.GGMLQuantizationType


def read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    header = read_gguf_header(path)
    return dict(gguf_tensors(header, gguf_config(header, str(path))))


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


@pytest.mark.parametrize("kind", GGML_NAME)
def test_types_give_the_numbers_of_transformers(kind: int) -> None:
    """Also of types that nothing here can write: the bytes are drawn, below those of infinite scales."""
    name, items, size = readable_types()[kind]
    raw = np.random.default_rng(kind).integers(0, 0x3C, (4, 256 // items * size), dtype=np.uint8)
    found = gguf_names._dequantised(raw.reshape(-1), GGUFTensor(name, kind, (4, 256), 0, raw.size))
    torch.testing.assert_close(torch.from_numpy(found), dequantize(torch.from_numpy(raw), kind).reshape(4, 256))


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
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"tokenizer.ggml.eos_token_id": None}, "eos_token_id is missing"),
        ({"llama.rope.scaling.factor": 2.0}, "rope.scaling.factor"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, "rope.scaling.type is 'linear'"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.attn_factor": 1.2}, "attn_factor is '1.2"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 64},
            "original_context_length is '64'",
        ),
        ({"llama.rope.scale_linear": 4.0}, "scale_linear is '4.0'"),
        ({"llama.tensor_data_layout": "of my own"}, "tensor_data_layout is 'of my own'"),
        ({"llama.attention.scale": 0.5}, "attention.scale"),
        ({"llama.attention.scale": "x"}, "attention.scale"),
        ({"llama.attention.sliding_window": 64}, "sliding_window"),
        ({"llama.attention.head_count_kv": [2, 6]}, "num_key_value_heads"),
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


NEUTRAL: list[dict[str, Any]] = [
    {"llama.tensor_data_layout": "Meta AI original pth"},
    {
        "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0,
        "llama.rope.scaling.original_context_length": 128,
    },
    {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 8.0},
    {"llama.rope.scaling.type": "linear"},
    {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
    {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 1.0, "llama.rope.scaling.yarn_ext_factor": 1.0},
    {"llama.rope.scale_linear": 1.0},
    {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [64, 64]},
    {"llama.attention.key_length": 32, "llama.attention.value_length": 32},
    {"llama.attention.scale": 32**-0.5},
    {"llama.expert_count": 0, "llama.logit_scale": 1.0, "llama.attention.clamp_kqv": 0.0},
    {"general.name": "x", "general.file_type": 7, "tokenizer.chat_template": "x"},
]  # fmt: skip


@pytest.mark.parametrize("changes", NEUTRAL, ids=lambda changes: "-".join(changes))
def test_what_changes_nothing_is_accepted(changes: dict[str, Any], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG), **changes)
    assert gguf_config(read_gguf_header(path)) == GGUF_CONFIG


def test_as_many_key_value_heads_as_query_heads_need_not_be_stated(tmp_path: Path) -> None:
    config = GGUF_CONFIG.model_copy(update={"num_key_value_heads": 6})
    changes = {"llama.attention.head_count_kv": None}
    assert (
        gguf_config(read_gguf_header(write_gguf(tmp_path / "x.gguf", config, hf_weights(config), **changes))) == config
    )


def test_a_file_without_theta_has_that_of_its_readers_and_says_so(tmp_path: Path) -> None:
    from transformers import AutoConfig

    changes = {"llama.rope.freq_base": None}
    path = write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG), **changes)
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    header = read_gguf_header(path)
    assert gguf_config(header).rope_theta == theirs.rope_parameters["rope_theta"] == 10_000
    assert "theta is 10,000" in gguf_notes(header)[0]
    assert gguf_notes(read_gguf_header(write_gguf(tmp_path / "y.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG)))) == ()


def test_every_end_of_a_text_is_found(tmp_path: Path) -> None:
    ids = {"eos": 3, "eot": 5, "eom": 3}
    changes = {f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items()}
    header = read_gguf_header(write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG), **changes))
    assert gguf_ends(header) == (3, 5)
    assert gguf_config(header).eos_token_id == 3


def test_rotary_tables_that_repeat_theta_are_compared_and_left_out(tmp_path: Path) -> None:
    weights = hf_weights(GGUF_CONFIG)
    frequencies = (1e5 ** -(np.arange(0, 32, 2) / 32)).astype(np.float32)
    tables = {"rope_freqs.weight": np.ones(16, np.float32), "blk.1.attn_rot_embd.weight": frequencies}
    assert read(write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, weights | tables)).keys() == weights.keys()
    for name, values in tables.items():
        path = write_gguf(
            tmp_path / "y.gguf", GGUF_CONFIG, weights | {name: values * np.linspace(1, 8, 16, dtype="f4")}
        )
        with pytest.raises(CheckpointError, match=f"scales the rotation by the tensor {name}"):
            read(path)


@pytest.mark.parametrize("wrong", ["missing", "extra", "shape", "layers"])
def test_tensors_that_do_not_fit_are_named(wrong: str, tmp_path: Path) -> None:
    weights, changes = hf_weights(GGUF_CONFIG), {}
    if wrong == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif wrong == "extra":
        weights["rope_freq.weight"] = np.ones(16, np.float32)
    elif wrong == "shape":
        weights["model.layers.1.mlp.up_proj.weight"] = np.ones((63, 192), np.float32)
    else:
        changes["llama.block_count"] = 2**31  # the table of names must not be built first
    path = write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, weights, **changes)
    names = {
        "missing": "mlp.up_proj",
        "extra": "rope_freq",
        "shape": r"\(63, 192\)",
        "layers": "2147483648 blocks",
    }
    with pytest.raises((CheckpointError, ConfigError), match=names[wrong]):
        read(path)
