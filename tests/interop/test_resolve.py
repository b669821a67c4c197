"""What MODEL names: one answer for every command, without PyTorch and without the weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, Repo, hub_with_client
from safetensors.torch import load_file
from small_models import GGUF_CONFIG, hf_weights, reference, write_gguf
from tiny import TrainTiny

from resmol.config.load import load_config, load_preset
from resmol.config.model_config import read_model_config
from resmol.errors import CheckpointError, ConfigError, DataError, NetworkError
from resmol.interop import resolve as module
from resmol.interop.hub_repository import TOKENIZER_FILES
from resmol.interop.load import load_model
from resmol.interop.resolve import Source, resolve
from resmol.run.checkpoint_manifest import read_manifest
from resmol.system.atomic_io import file_sha256

PACKAGE = Path(module.__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resolve")


@pytest.fixture
def run(run_folder: Path, train_tiny: TrainTiny, tmp_path: Path) -> Path:
    """A run with checkpoints 5 and 10; a copy for each test."""
    if not (run_folder / "run").exists():
        train_tiny(run_folder / "run", 10)
    return Path(shutil.copytree(run_folder / "run", tmp_path / "run"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    reference().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with hub_with_client(tmp_path, monkeypatch) as server:
        yield server


# --- runs and checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers_only", [True, False])
def test_a_run_is_its_newest_checkpoint(run: Path, headers_only: bool) -> None:
    checkpoint = run / "checkpoints" / "step-00000010"
    found = resolve(run, headers_only=headers_only)
    assert found == resolve(checkpoint, headers_only=headers_only)
    assert (found.kind, found.path, found.step, found.trained_here) == ("checkpoint", checkpoint, 10, True)
    assert found.sha256 == read_manifest(checkpoint).sha256
    assert found.run is not None
    assert found.run.path.samefile(run)
    assert found.settings == load_config(run / "config.toml")
    assert found.config == found.settings.model
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    assert found.tensors is not None
    assert {name: info.shape for name, info in found.tensors.items()} == shapes


def test_a_checkpoint_has_its_run_from_wherever_it_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "checkpoints")
    (run.parent / "step-00000005").symlink_to(run / "checkpoints" / "step-00000005")
    for name in ("step-00000005", "../checkpoints/step-00000005", run.parent / "step-00000005"):
        found = resolve(name)
        assert found.step == 5
        assert found.run is not None
        assert found.run.path.samefile(run)


def test_what_merely_lies_in_a_run_is_not_its_checkpoint(run: Path, folder: Path) -> None:
    shutil.copytree(folder, run / "exports" / "hf")
    shutil.copytree(run / "checkpoints" / "step-00000010", run / "copies" / "step-00000010")
    assert resolve(run / "exports" / "hf").run is None
    moved = resolve(run / "copies" / "step-00000010")
    assert (moved.kind, moved.step, moved.run, moved.settings) == ("checkpoint", 10, None, None)


def test_bytes_are_verified_only_where_the_weights_are_wanted(run: Path, messages: list[str]) -> None:
    weights = run / "checkpoints" / "step-00000010" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert resolve(run, headers_only=True).step == 10
    assert not messages
    assert resolve(run).step == 5
    assert any("step-00000010" in line and "sha256" in line for line in messages)
    (weights.parent / "manifest.json").unlink()
    assert resolve(run, headers_only=True).step == 5
    with pytest.raises(CheckpointError, match="manifest"):
        resolve(weights.parent, headers_only=True)


@pytest.mark.parametrize("headers_only", [True, False])
def test_a_run_without_a_checkpoint_is_its_configuration(run: Path, headers_only: bool) -> None:
    shutil.rmtree(run / "checkpoints")
    found = resolve(run, headers_only=headers_only)
    assert (found.kind, found.weights, found.notes) == ("run", None, ("the run has no checkpoint yet",))
    assert found.config == load_config(run / "config.toml").model


# --- files and folders ---------------------------------------------------------------------------------------


def test_a_folder_of_hugging_face(folder: Path) -> None:
    found = resolve(folder)
    assert (found.kind, found.config, found.run) == ("huggingface", read_model_config(folder), None)
    assert found.sha256 == file_sha256(folder / "model.safetensors")
    assert resolve(folder, headers_only=True).sha256 == ""


def test_parts_of_a_folder(folder: Path) -> None:
    """Its weights alone, its configuration alone, and a folder with only one of them."""
    config = read_model_config(folder)
    file = resolve(folder / "model.safetensors")
    assert (file.kind, file.config) == ("safetensors", None)
    assert file.tensors == resolve(folder).tensors
    assert resolve(folder / "config.json") == Source("config", folder / "config.json", config)
    weights = (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    assert resolve(folder, headers_only=True).config == config
    with pytest.raises(DataError, match="holds no weights"):
        resolve(folder)
    (folder / "config.json").unlink()
    weights.rename(folder / "model.safetensors")
    bare = resolve(folder)
    assert (bare.kind, bare.config, bare.tensors, bare.notes) == (
        "safetensors", None, file.tensors, ("the folder has no config.json",),
    )  # fmt: skip


def test_a_gguf_file_and_a_folder_that_is_there_for_it(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    path = write_gguf(tmp_path / "folder" / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG))
    found = resolve(path)
    assert found == resolve(path.parent)
    assert (found.kind, found.config, found.sha256) == ("gguf", GGUF_CONFIG, file_sha256(path))
    assert found.tensors is not None
    assert found.tensors["model.embed_tokens.weight"].shape == (96, 192)


def test_a_folder_with_an_adapter_is_refused(folder: Path, hub: Hub) -> None:
    """transformers adds it to the base model that it names, so the weights here are not what the model computes."""
    (folder / "adapter_config.json").write_text("{}")
    put(hub, folder)
    for source in (folder, "alice/nano"):
        for headers_only in (True, False):
            with pytest.raises(DataError, match="holds a PEFT adapter") as caught:
                resolve(source, headers_only=headers_only)
            assert "merge_and_unload" in caught.value.fix


def test_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A path takes precedence over a preset of the same name."""
    monkeypatch.chdir(tmp_path)
    config = load_preset("nano")
    assert resolve("nano") == Source("preset", Path("nano"), config.model, settings=config)
    (tmp_path / "mine.toml").write_text(config.to_toml(), encoding="utf-8")
    assert resolve("mine.toml").settings == config
    folder.rename(tmp_path / "nano")
    assert resolve("nano").kind == "huggingface"


def test_names_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is not there is not looked for on the Hub."""
    monkeypatch.chdir(tmp_path)
    for name in ("nowhere", "a/config.json", "a/x.gguf", "a/b/c"):
        with pytest.raises(DataError, match=f"there is no model {name}") as caught:
            resolve(name)
        assert not isinstance(caught.value, NetworkError)
    with pytest.raises(DataError, match=r"did you mean the preset smollm2-135m\?"):
        resolve("smollm2-135")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        resolve(tmp_path / "pipe")


# --- the Hub -------------------------------------------------------------------------------------------------


def put(hub: Hub, folder: Path, name: str = "alice/nano") -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    from hub_server import sha256

    hub.objects |= {sha256(data): data for data in files.values()}
    hub.repos.setdefault(f"models/{name}", Repo(private=False, sdk=None)).commit(files, "a push")


@pytest.mark.parametrize("shards", ["5GB", "10KB"])
def test_a_model_on_the_hub_is_described_without_its_weights(hub: Hub, tmp_path: Path, shards: str) -> None:
    reference(vocab_size=4096, hidden_size=48).save_pretrained(tmp_path / "hf", max_shard_size=shards)
    put(hub, tmp_path / "hf")
    found = resolve("alice/nano", headers_only=True)
    assert (found.kind, found.path, found.config) == ("hub", Path("alice/nano"), read_model_config(tmp_path / "hf"))
    assert found.tensors == resolve(tmp_path / "hf", headers_only=True).tensors
    assert found.notes == ()
    whole = resolve("alice/nano")
    assert (whole.kind, whole.config, whole.tensors) == (found.kind, found.config, found.tensors)
    assert whole.sha256 == resolve(tmp_path / "hf").sha256


def test_another_architecture_is_refused_before_its_weights_are_fetched(hub: Hub, folder: Path) -> None:
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(table | {"model_type": "gpt2"}))
    put(hub, folder)
    for headers_only in (True, False):
        with pytest.raises(ConfigError, match="model_type"):
            resolve("alice/nano", headers_only=headers_only)
    assert not hub.sent("safetensors|cdn")


def test_headers_that_cannot_be_fetched_are_noted(hub: Hub, folder: Path) -> None:
    put(hub, folder)
    hub.breaks = lambda request: 404 if "model.safetensors" in request else None
    found = resolve("alice/nano", headers_only=True)
    assert (found.config, found.weights) == (read_model_config(folder), None)
    assert "was not compared with the weights" in found.notes[0]


def test_what_a_model_says_is_downloaded_with_it(hub: Hub, folder: Path) -> None:
    """Its ends, and the files of a tokenizer of any kind: a missing one would be replaced by SmolLM2's."""
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    for name in TOKENIZER_FILES:
        (folder / name).write_text("{}")
    put(hub, folder)
    found = resolve("alice/nano")
    assert found.ends == (0, 2)
    assert {file.name for file in found.path.iterdir()} >= set(TOKENIZER_FILES)


def test_parts_of_a_gguf_repository_are_downloaded_together(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    names = [f"x-{number:05}-of-00002.gguf" for number in (1, 2)]
    for name in names:
        (tmp_path / "folder" / name).write_bytes(b"GGUF")
    put(hub, tmp_path / "folder")
    with pytest.raises(CheckpointError, match=names[0]) as caught:  # which is read, and is no model
        resolve("alice/nano")
    first = Path(str(caught.value).split(" is not")[0])
    assert {file.name for file in first.parent.iterdir()} == set(names)
    (tmp_path / "folder" / "y.gguf").write_bytes(b"GGUF")
    put(hub, tmp_path / "folder", "alice/several")
    with pytest.raises(DataError, match=f"holds 2 GGUF models .{names[0]}, y.gguf. and no safetensors"):
        resolve("alice/several")


def test_a_gguf_repository_is_not_downloaded_to_be_described(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    path = write_gguf(tmp_path / "folder" / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG))
    put(hub, path.parent)
    with pytest.raises(DataError, match=r"keeps its architecture in x\.gguf"):
        resolve("alice/nano", headers_only=True)
    assert not hub.sent("GET .*(resolve|cdn)")
    found = resolve("alice/nano")
    assert (found.kind, found.path.name, found.config) == ("hub", "x.gguf", GGUF_CONFIG)


# --- the house -----------------------------------------------------------------------------------------------


def test_resolving_does_not_import_pytorch(folder: Path, run: Path, tmp_path: Path) -> None:
    gguf = write_gguf(tmp_path / "x.gguf", GGUF_CONFIG, hf_weights(GGUF_CONFIG))
    code = (
        "import sys; from resmol.interop.resolve import resolve\n"
        "for source in sys.argv[1:]: resolve(source)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, "nano", str(folder), str(run), str(gguf)], check=True)


def test_only_resolve_walks_from_a_checkpoint_to_its_run() -> None:
    """No other code climbs two folders up; it reads `Source.run`."""
    climbs = re.compile(r"\.parent\.parent|\.parents\[")
    found = [path.name for path in PACKAGE.rglob("*.py") if climbs.search(path.read_text(encoding="utf-8"))]
    assert found == ["installation.py"]  # from the sources to the checkout
    assert "folder.parent" in (PACKAGE / "interop" / "resolve.py").read_text(encoding="utf-8")


def test_loading_reads_what_was_resolved(run: Path) -> None:
    loaded = load_model(run, device="cpu")
    assert loaded.source == resolve(run)
    assert loaded.config == loaded.source.config


@pytest.mark.parametrize("name", ["runs/nope", "mine/nope"])
def test_a_mistyped_local_path_is_not_sent_to_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "note").mkdir(parents=True)
    monkeypatch.setattr("resmol.interop.resolve._hub", lambda *_: pytest.fail("the Hub was asked"))
    with pytest.raises(DataError, match=f"there is no {name}") as refused:
        resolve(name)
    assert ("did you mean mine/note?" in refused.value.fix) == name.startswith("mine")
