"""What a weight file says twice is compared: equal copies load, others are refused; against transformers' buffers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import reference

from resmol.errors import CheckpointError
from resmol.interop.load import load_model

HEAD_DIM = 8


def buffers(theta: float = 1e5, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The tables that transformers 4.30 stored for each block, computed by transformers of today."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = reference(rope_parameters={"rope_theta": theta, "rope_type": "default"}).config
    rotary: Any = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(config.max_position_embeddings)[None])
    tables = {"inv_freq": rotary.inv_freq, "cos_cached": cos[None], "sin_cached": sin[None]}
    return {f"model.layers.1.self_attn.rotary_emb.{name}": table.to(dtype) for name, table in tables.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    reference().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def logits(folder: Path) -> torch.Tensor:
    found: torch.Tensor = load_model(folder, device="cpu").model(torch.tensor([[5, 7, 1, 0]]))
    return found


def head(tensors: dict[str, torch.Tensor], change: Any = torch.clone) -> None:
    tensors["lm_head.weight"] = change(tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tables_of_theta_are_accepted_whatever_their_type(folder: Path, dtype: torch.dtype) -> None:
    before = logits(folder)
    rewrite(folder, lambda tensors: tensors.update(buffers(dtype=dtype)))
    assert torch.equal(logits(folder), before)
    rewrite(folder, lambda t: t.update({"model.rotary_emb.inv_freq": buffers(dtype=dtype).popitem()[1][0, 0, 1, :4]}))
    with pytest.raises(CheckpointError, match=r"model\.rotary_emb\.inv_freq"):
        logits(folder)


@pytest.mark.parametrize("name", ["inv_freq", "cos_cached", "sin_cached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_of_another_theta_is_refused_by_name(folder: Path, name: str, dtype: torch.dtype) -> None:
    found = {key: table for key, table in buffers(1e4, dtype).items() if key.endswith(name)}
    rewrite(folder, lambda tensors: tensors.update(found))
    with pytest.raises(CheckpointError, match=rf"rotary_emb\.{name}, which is not that of config.json's rope_theta"):
        logits(folder)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (1, 4)])
def test_a_table_of_another_shape_is_refused(folder: Path, shape: tuple[int, ...]) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(shape)}))
    with pytest.raises(CheckpointError, match="inv_freq"):
        logits(folder)


def test_an_equal_copy_of_the_tied_matrix_is_accepted_under_either_name(folder: Path) -> None:
    before = logits(folder)
    rewrite(folder, head)
    assert torch.equal(logits(folder), before)
    rewrite(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert torch.equal(logits(folder), before)


@pytest.mark.parametrize("change", [lambda t: t + 1e-3, lambda t: t[:-1], lambda t: t * float("nan")])
def test_another_copy_is_refused_and_the_message_says_what_to_set(folder: Path, change: Any) -> None:
    rewrite(folder, lambda tensors: head(tensors, change))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight with other numbers than the embedding") as caught:
        logits(folder)
    assert '"tie_word_embeddings": false' in caught.value.fix


def test_a_model_that_was_saved_without_its_output_layer_is_read_as_transformers_does(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    before = logits(folder)
    rewrite(folder, lambda t: t.update({name.removeprefix("model."): t.pop(name) for name in list(t)}))
    assert torch.equal(logits(folder), before)
    theirs = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[5, 7, 1, 0]])).logits
    torch.testing.assert_close(logits(folder), theirs, atol=1e-5, rtol=1e-5)
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["norm.weight"]}))
    with pytest.raises(CheckpointError, match="tensor names"):
        logits(folder)
