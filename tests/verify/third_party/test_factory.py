"""A student's class or function is found by file or module, and gets the configuration in the form that it wants."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypedDict

import pytest
import torch
import transformers
from students import SMALL, Config, SmolLM2, distance
from torch import nn

from resmol.config.load import load_preset
from resmol.errors import CheckFailed, UsageError
from resmol.verify.third_party.config_view import ConfigView, different_defaults, field_value
from resmol.verify.third_party.factory import build, import_factory
from resmol.verify.third_party.third_party_model import build_third_party

PUBLISHED = load_preset("smollm2-135m").model


@pytest.fixture(autouse=True)
def no_imports_stay() -> Iterator[None]:
    modules, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    sys.path[:] = path


# --- finding it ----------------------------------------------------------------------------------------------


def test_a_class_is_found_in_a_file_beside_which_others_lie(tmp_path: Path) -> None:
    (tmp_path / "shapes_of_mine.py").write_text("WIDTH = 7\n", encoding="utf-8")
    (tmp_path / "mine.py").write_text(
        "from shapes_of_mine import WIDTH\nclass M:\n    width = WIDTH\n", encoding="utf-8"
    )
    assert import_factory(f"{tmp_path / 'mine.py'}:M")().width == 7


def test_a_file_of_a_package_can_import_relatively(tmp_path: Path) -> None:
    package = tmp_path / "their_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "sizes.py").write_text("WIDTH = 8\n", encoding="utf-8")
    (package / "net.py").write_text("from .sizes import WIDTH\ndef build():\n    return WIDTH\n", encoding="utf-8")
    assert import_factory(f"{package / 'net.py'}:build")() == 8


@pytest.mark.parametrize("is_package", [False, True])
def test_a_file_that_was_changed_is_read_again(is_package: bool, tmp_path: Path) -> None:
    folder = tmp_path / "changing_package"
    folder.mkdir()
    if is_package:
        (folder / "__init__.py").touch()
    for answer in (1, 22):
        (folder / "changing.py").write_text(f"def build():\n    return {answer}\n", encoding="utf-8")
        assert import_factory(f"{folder / 'changing.py'}:build")() == answer


def test_a_file_named_like_a_library_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def build():\n    return 1\n", encoding="utf-8")
    assert import_factory(f"{tmp_path / 'json.py'}:build")() == 1
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.py:M", "there is no file missing.py"),
        ("no_such_module:M", "there is no module 'no_such_module'"),
        ("model.ipynb:M", "a notebook cannot be imported"),
        ("theirs.py:Modle", "it has no 'Modle'; its modules are Model"),
        ("theirs.py", "the name of the class is missing; its modules are Model"),
        ("theirs.py:number", "is a int, not a class or function"),
    ],
)
def test_what_is_not_there(name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from torch import nn\nclass Model(nn.Module): ...\nnumber = 1\n"
    (tmp_path / "theirs.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        import_factory(name)


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        (
            "import no_such_library\n",
            "ModuleNotFoundError.*broken.py:1: `import no_such_library`",
            "install no_such_lib",
        ),
        ("x = 1\nraise ValueError('no GPU')\n", "importing: ValueError: no GPU .*broken.py:2", "importable"),
        ("def f(:\n", "importing: SyntaxError.*broken.py:1", "importable"),
        ("import sys\nsys.exit('usage: train.py')\n", "it ends the program: sys.exit.usage", "__main__"),
    ],
)
def test_a_file_that_cannot_be_imported(
    text: str, what: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckFailed, match=what) as caught:
        import_factory("broken.py:M")
    assert fix in caught.value.fix


# --- the configuration ---------------------------------------------------------------------------------------


class Fields(TypedDict):
    hidden_size: int


@dataclass
class GptConfig:
    """Other names, a derived size, a switch of its own, and defaults of SmolLM2-135M with two mistakes."""

    vocab: int = 49152
    n_embd: int = 576
    hidden_dim: int = 1536
    n_layer: int = 30
    n_head: int = 9
    n_kv_heads: int = 3
    block_size: int = 2048
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    dropout: float = 0.25

    def __post_init__(self) -> None:
        self.size = self.n_embd // self.n_head


class ClassOfConstants:
    vocab_size, n_embd, n_layer = 1, 2, 3

    def __init__(self) -> None: ...


def from_attributes(config):
    return SmolLM2(config)


def from_subscripts(config: dict):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
    return SmolLM2(Config(**{name: config[name] for name in names}, **heads(config)))


def heads(config: Any) -> dict[str, Any]:
    return {name: config.get(name) for name in ("num_attention_heads", "num_key_value_heads", "rope_theta")}


def from_keywords(**fields):
    return SmolLM2(SimpleNamespace(**fields))


def from_typed_dict(config: Fields):
    return SmolLM2(SimpleNamespace(**config))


def from_parameters(vocab_size, dim, n_layers, n_heads, n_kv_heads, hidden_dim, norm_eps=1e-6, theta=1e4):
    return SmolLM2(Config(vocab_size, dim, hidden_dim, n_layers, n_heads, n_kv_heads, 99, norm_eps, theta))


def from_its_own_class(config: GptConfig | None = None):
    assert isinstance(config, GptConfig)
    assert config.size == SMALL.head_dim
    assert config.dropout == 0.25  # no part of the architecture: its own
    names = {"vocab_size": config.vocab, "hidden_size": config.n_embd, "intermediate_size": config.hidden_dim}
    counts = {"num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head}
    rest = {"num_key_value_heads": config.n_kv_heads, "rope_theta": config.rope_base, "rms_norm_eps": config.norm_eps}
    return SmolLM2(Config(**names, **counts, **rest))


def from_the_recipe(config):
    section = config["model"]["model_config"]
    assert config["init_method"]["std"] == SMALL.initializer_range
    return SmolLM2(section)


def with_a_cache(config):
    return SmolLM2(config), {"cache": None}


@pytest.mark.parametrize(
    "factory",
    [
        SmolLM2, from_attributes, from_subscripts, from_keywords, from_typed_dict, from_parameters, from_its_own_class,
        from_the_recipe, with_a_cache,
    ],
)  # fmt: skip
def test_every_form_of_configuration(factory: Any) -> None:
    assert distance(factory) < 1e-5


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_classes_of_transformers_get_their_own(name: str) -> None:
    assert distance(getattr(transformers, name)) < 1e-5


def test_every_published_field_and_the_defaults_of_llama_config_are_there() -> None:
    view = ConfigView(SMALL)
    published = transformers.LlamaConfig(**view)
    assert (published.hidden_size, published.rope_parameters["rope_theta"]) == (48, SMALL.rope_theta)
    expected = {
        "attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1, "pad_token_id": None, "use_cache": True,
        "output_attentions": False, "use_return_dict": True, "rope_scaling": None, "head_dim": 16, "mlp_bias": False,
        "model_type": "llama", "tie_word_embeddings": True, "is_llama_config": True, "dtype": torch.float32,
        "n_embd": 48, "block_size": SMALL.max_position_embeddings, "bias": False, "dropout": 0.0,
        "rope_freq": None,
    }  # fmt: skip
    assert {name: getattr(view, name) for name in expected} == expected
    view.note = 1
    assert (view["note"], view.get("nothing", 2), getattr(view, "nothing", 3)) == (1, 2, 3)
    assert view.to_dict()["hidden_size"] == 48


def test_a_field_that_nobody_has_is_named_with_the_students_line() -> None:
    def build_with_a_typo(config):
        return nn.Linear(config.hidden_sise, 1)

    with pytest.raises(CheckFailed, match=r"building: .*hidden_sise .*nearest is hidden_size .*test_factory.py:\d+: `"):
        build(build_with_a_typo, SMALL)


def test_the_defaults_of_a_configuration_class_are_compared_where_its_sizes_are_smollm2s() -> None:
    assert different_defaults(GptConfig, PUBLISHED) == {"block_size": (2048, 8192), "rope_base": (10_000.0, 100_000.0)}
    assert different_defaults(Config, PUBLISHED) == {}
    assert different_defaults(ClassOfConstants, PUBLISHED) == {}  # another model


@pytest.mark.parametrize(("factory", "words"), [(lambda _: None, "nothing"), (lambda _: 3, "a int")])
def test_a_factory_that_returns_no_module(factory: Any, words: str) -> None:
    with pytest.raises(CheckFailed, match=f"building: the factory returned {words}"):
        build(factory, SMALL)


def test_a_module_with_parameters_without_a_shape_is_refused() -> None:
    with pytest.raises(CheckFailed, match="building: a parameter has no shape yet"):
        build_third_party(lambda _: nn.LazyLinear(2), SMALL)


def test_a_name_that_means_two_things_is_told_by_those_beside_it() -> None:
    assert field_value("hidden_dim", SMALL, ["dim", "hidden_dim"]) == (True, SMALL.intermediate_size)
    assert field_value("hidden_dim", SMALL, ["intermediate_size", "hidden_dim"]) == (True, SMALL.hidden_size)


def test_a_module_that_is_there_already() -> None:
    built = build(nn.Linear(2, 2), SMALL)
    assert built.ignores_config
    assert "its sizes are fixed" in built.note
