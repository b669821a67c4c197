"""Parts of a split GGUF model are one model; a folder with several asks which one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from small_models import GGUF_CONFIG, hf_weights, write_gguf

from resmol.errors import CheckpointError, DataError
from resmol.interop.gguf_parts import gguf_models, part_names
from resmol.interop.load import load_model
from resmol.interop.resolve import resolve


def split(path: Path, parts: list[list[str]], **stated: Any) -> list[Path]:
    """Cut a file as llama.cpp does: metadata in the first part, some tensors in each."""
    reader = gguf.GGUFReader(path)
    files = []
    for number, names in enumerate(parts):
        file = path.with_name(f"nano-{number + 1:05}-of-{len(parts):05}.gguf")
        writer = gguf.GGUFWriter(file, "llama")
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                writer.add_key_value(key, field.contents(), field.types[0])
        writer.add_uint16("split.no", stated.get("no", number))
        writer.add_uint16("split.count", stated.get("count", len(parts)))
        writer.add_int32("split.tensors.count", stated.get("tensors", len(reader.tensors)))
        for tensor in reader.tensors:
            if tensor.name in names:
                writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.append(file)
    return files


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_gguf(
        tmp_path / "whole" / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG), gguf.GGMLQuantizationType.Q8_0
    )


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Path:
    (tmp_path / "whole").mkdir()
    return tmp_path


@pytest.fixture
def names(whole: Path) -> list[str]:
    return [tensor.name for tensor in gguf.GGUFReader(whole).tensors]


def test_any_part_and_the_folder_give_the_whole_model(whole: Path, names: list[str]) -> None:
    expected = load_model(whole, device="cpu").model.state_dict()
    files = split(whole, [[], names[:7], names[7:]])  # the first part holds the metadata alone
    whole.unlink()
    sources = [*files, whole.parent]
    for source in sources:
        loaded = load_model(source, device="cpu").model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert len({resolve(source).sha256 for source in sources}) == 1
    assert resolve(files[0], headers_only=True).tensors == resolve(files[2], headers_only=True).tensors


def test_a_missing_part_is_named(whole: Path, names: list[str]) -> None:
    files = split(whole, [names[:7], names[7:9], names[9:]])
    files[1].unlink()
    whole.unlink()
    for source in (files[0], files[2], whole.parent):
        with pytest.raises(DataError, match=r"one of 3 parts of a model, and \S+ lacks nano-00002-of-00003\.gguf"):
            load_model(source)


def test_a_part_under_another_name_says_what_it_is(whole: Path, names: list[str]) -> None:
    files = split(whole, [names[:7], names[7:]])
    renamed = files[1].rename(whole.with_name("second.gguf"))
    with pytest.raises(DataError, match=r"second\.gguf is part 2 of 2 of a model") as caught:
        load_model(renamed)
    assert "NAME-00001-of-00002.gguf" in caught.value.fix


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"no": 0}, "part 0"), ({"count": 3}, "of 3"), ({"tensors": 99}, "the first says that there are 99")],
)
def test_parts_of_different_models_are_refused(
    whole: Path, names: list[str], change: dict[str, Any], expected: str
) -> None:
    files = split(whole, [names[:7], names[7:]], **change)
    with pytest.raises(CheckpointError, match="does not belong to the parts beside it") as caught:
        load_model(files[0])
    assert expected in caught.value.what


def test_a_tensor_in_two_parts_is_refused(whole: Path, names: list[str]) -> None:
    files = split(whole, [names[:7], names[6:]])
    with pytest.raises(CheckpointError, match="another part holds"):
        load_model(files[0])


def test_a_folder_with_several_models_asks_which(whole: Path, names: list[str]) -> None:
    split(whole, [names[:7], names[7:]])
    for other in ("a-Q4_K_M.gguf", "a-Q8_0.gguf"):
        shutil.copy(whole, whole.with_name(other))
    whole.unlink()
    with pytest.raises(DataError, match="holds 3 GGUF models") as caught:
        load_model(whole.parent)
    assert "a-Q4_K_M.gguf, a-Q8_0.gguf, nano-00001-of-00002.gguf" in caught.value.what
    assert str(whole.with_name("a-Q4_K_M.gguf")) in caught.value.fix
    assert load_model(whole.with_name("a-Q8_0.gguf")).config == GGUF_CONFIG


def test_a_folder_with_a_config_and_only_a_gguf_file_is_there_for_it(whole: Path) -> None:
    (whole.parent / "config.json").write_text("{}")
    assert resolve(whole.parent).path == whole


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("x.gguf", 1), ("x-00001-of-00001.gguf", 1), ("x-00002-of-00003.gguf", 3), ("x-00004-of-00003.gguf", 1),
        ("x-00000-of-00003.gguf", 1), ("-00001-of-00002.gguf", 1), ("x-1-of-2.gguf", 1),
    ],
)  # fmt: skip
def test_names_of_parts(name: str, parts: int) -> None:
    found = part_names(name)
    assert len(found) == parts
    assert name in found


def test_models_of_a_listing() -> None:
    names = ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b.gguf", "sub/c.gguf", "d.safetensors"]
    assert gguf_models(names) == ["a-00001-of-00002.gguf", "b.gguf"]
