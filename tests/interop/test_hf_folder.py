"""Which files hold the weights, and do they fit config.json: against folders that transformers writes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import reference

from resmol.checks import Check
from resmol.config.load import load_preset
from resmol.config.model_config import ModelConfig, read_model_config
from resmol.errors import CheckpointError, ConfigError, DataError
from resmol.interop.hf_folder import cross_check, find_weights
from resmol.model.flops import total_parameters
from resmol.model.shapes import tensor_shapes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    reference().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    reference().save_pretrained(tmp_path / "hf", max_shard_size="10KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    return tmp_path / "hf"


def checks(folder: Path) -> dict[str, Check]:
    return {check.name: check for check in cross_check(read_model_config(folder), find_weights(folder).tensors)}


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads", [(3, 1), (6, 2), (4, 4)])
def test_expected_names_and_shapes_are_those_of_transformers(tied: bool, heads: tuple[int, int]) -> None:
    model = reference(tie_word_embeddings=tied, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    values = model.config.to_dict()
    config = ModelConfig(**{name: values.get(name, 1e5) for name in ModelConfig.model_fields})
    assert tensor_shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("preset", ["smollm2-135m", "smollm2-360m", "smollm2-1.7b", "nano"])
def test_expected_shapes_add_up_to_the_number_of_parameters(preset: str) -> None:
    config = load_preset(preset).model
    sizes = [torch.Size(shape).numel() for shape in tensor_shapes(config).values()]
    assert sum(sizes) == total_parameters(config)
    assert preset != "smollm2-135m" or len(sizes) == 272


def test_a_folder_of_transformers_passes(folder: Path, tmp_path: Path) -> None:
    assert all(check.passed for check in checks(folder).values())
    assert find_weights(folder).files == (folder / "model.safetensors",)
    reference(tie_word_embeddings=False).to(torch.bfloat16).save_pretrained(tmp_path / "untied")
    assert all(check.passed for check in checks(tmp_path / "untied").values())


def test_shards_are_read_as_one(sharded: Path, tmp_path: Path) -> None:
    reference().save_pretrained(tmp_path / "single")
    found, single = find_weights(sharded).tensors, find_weights(tmp_path / "single").tensors
    assert {name: info.shape for name, info in found.items()} == {name: info.shape for name, info in single.items()}
    assert all(check.passed for check in checks(sharded).values())


@pytest.mark.parametrize(
    ("change", "check", "text"),
    [
        (lambda t: t.pop("model.norm.weight"), "tensor names", "missing: 'model.norm.weight'"),
        (lambda t: t.update(x=torch.ones(1)), "tensor names", "unexpected: 'x'"),
        (lambda t: t.pop("model.embed_tokens.weight"), "tensor names", "missing: 'model.embed_tokens.weight'"),
        (
            lambda t: t.update({"model.layers.2.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
            "tensor names",
            "unexpected: 'model.layers.2.self_attn.rotary_emb.inv_freq'",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(32)}),
            "tensor names",
            "have biases",
        ),
        (
            lambda t: t.update({f"_orig_mod.{n}": t.pop(n) for n in list(t)}),
            "tensor names",
            "training wrapper",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(25)}),
            "tensor shapes",
            "norm.weight is [25], not [24]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(24).long()}),
            "tensor types",
            "norm.weight is I64",
        ),
    ],
)
def test_every_disagreement_is_named(folder: Path, change: Any, check: str, text: str) -> None:
    rewrite(folder, change)
    found = checks(folder)
    assert not found[check].passed
    assert text in found[check].measured
    assert sum(not item.passed for item in found.values()) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
        lambda t: t.update({f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}),
        lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(4)}),
        lambda t: t.update({name: tensor.double() for name, tensor in t.items()}),
    ],
    ids=["copy", "other name", "buffers", "buffer", "float64"],
)
def test_what_loading_settles_is_no_disagreement(folder: Path, change: Any) -> None:
    rewrite(folder, change)
    assert all(check.passed for check in checks(folder).values())


def test_an_untied_config_misses_its_output_layer(folder: Path) -> None:
    config = read_model_config(folder).model_copy(update={"tie_word_embeddings": False})
    names = cross_check(config, find_weights(folder).tensors)[0]
    assert "the file has none" in names.measured


def test_a_depth_that_would_fill_the_memory_is_refused(folder: Path) -> None:
    config = read_model_config(folder).model_copy(update={"num_hidden_layers": 10**12})
    with pytest.raises(ConfigError, match="1000000000000 blocks"):
        tensor_shapes(config)


# --- files that should not be there ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "x.bin", "", ".x.safetensors",
        "x\0.safetensors", "x.safetensors\n", "./../x.safetensors", "././x.safetensors", 7, None, ["x.safetensors"],
        "C:\\x.safetensors",
    ],
)  # fmt: skip
def test_an_index_names_plain_files_of_its_folder_only(sharded: Path, name: Any) -> None:
    index = sharded / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"not a plain \.safetensors name"):
        find_weights(sharded)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"[" * 100_000, b"\xff"],
)
def test_an_index_that_is_none_is_refused(sharded: Path, content: bytes) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a sound index"):
        find_weights(sharded)


def test_a_link_of_a_folder_that_the_user_named_is_followed(sharded: Path, tmp_path: Path) -> None:
    """As older download tools and DVC leave them; what an index names must lie in the folder all the same."""
    for shard in sharded.glob("*.safetensors"):
        shutil.move(shard, tmp_path / f"blob-{shard.name}")
        shard.symlink_to(tmp_path / f"blob-{shard.name}")
    assert all(check.passed for check in checks(sharded).values())
    shard.unlink()
    os.mkfifo(tmp_path / "pipe")
    shard.symlink_to(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        find_weights(sharded)


def test_an_index_may_begin_its_names_with_the_folder_itself(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"] = {name: f"./{file}" for name, file in table["weight_map"].items()}
    index.write_text(json.dumps(table))
    assert all(check.passed for check in checks(sharded).values())


def test_the_links_of_the_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.move(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    assert all(check.passed for check in checks(snapshot).values())


def test_a_shard_that_is_not_as_the_index_says_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match="does not hold the tensors that the index lists"):
        find_weights(sharded)
    second.unlink()
    with pytest.raises(DataError, match="cannot read"):
        find_weights(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "x.ckpt", ".metadata"])
def test_a_folder_with_pickles_only_is_refused_unread(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError, match=r"pickle.*never unpickles"):
        find_weights(folder)


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no weights"):
        find_weights(tmp_path)
