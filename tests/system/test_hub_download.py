"""Models on the Hub, with the Hub's real client against a Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Files, Hub, Repo, hub_with_client
from test_gguf import CONFIG, hf_weights, write_gguf
from test_hf_folder import reference

from resmol.errors import DataError, NetworkError
from resmol.interop.load import load_model
from resmol.system import hub_download as module
from resmol.system.atomic_io import file_sha256
from resmol.system.hub_download import hub_file, is_hub_id

FIX = "try again"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with hub_with_client(tmp_path, monkeypatch) as server:
        yield server


def store(hub: Hub, files: Files, name: str = "alice/nano") -> str:
    """Commit files as if somebody had pushed them."""
    hub.objects |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}
    return hub.repos.setdefault(f"models/{name}", Repo(private=False, sdk=None)).commit(files, "a push")


def unplug(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing answers any more: the look-up of the Hub, and what the client does after it."""

    def no_answer(*_: object) -> None:
        raise NetworkError("the Hub cannot be reached", fix=FIX)

    monkeypatch.setattr(module, "require_answer", no_answer)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("me/nano", True), ("A1/b.c-d_e", True), ("nano", False), ("a/b/c", False), ("../x", False), ("a/b\n", False),
     ("/a", False), ("./a", False), ("~/a", False), ("é/a", False), ("a/" + "b" * 97, False)],
)  # fmt: skip
def test_what_a_hub_id_is(text: str, is_one: bool) -> None:
    assert is_hub_id(text) == is_one


# --- one file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", [None, "main"])
def test_the_newest_is_the_newest(hub: Hub, revision: str | None) -> None:
    store(hub, {"config.json": b"old"})
    assert hub_file("alice/nano", "config.json", revision=revision, fix=FIX).read_bytes() == b"old"
    store(hub, {"config.json": b"new"})
    assert hub_file("alice/nano", "config.json", revision=revision, fix=FIX).read_bytes() == b"new"


def test_a_commit_is_asked_for_once(hub: Hub) -> None:
    old = store(hub, {"config.json": b"old"})
    store(hub, {"config.json": b"new"})
    assert hub_file("alice/nano", "config.json", revision=old, fix=FIX).read_bytes() == b"old"
    hub.requests.clear()
    assert hub_file("alice/nano", "config.json", revision=old, fix=FIX).read_bytes() == b"old"
    assert hub.requests == []


def test_without_a_connection_the_cache_is_what_there_is(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    store(hub, {"config.json": b"old"})
    path = hub_file("alice/nano", "config.json", fix=FIX)
    unplug(monkeypatch)
    assert hub_file("alice/nano", "config.json", fix=FIX) == path
    with pytest.raises(NetworkError, match="cannot be reached"):
        hub_file("alice/nano", "tokenizer.json", fix=FIX)


# --- a model -------------------------------------------------------------------------------------------------


def test_a_published_gguf_folder_is_a_model(
    hub: Hub, tmp_path: Path, tiny_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its one GGUF file and its tokenizer come, and nothing else; later also without a connection."""
    config = CONFIG.model_copy(update={"vocab_size": 512})
    file = write_gguf(tmp_path / "mine-F32.gguf", config, hf_weights(config))
    papers = {"README.md": b"# Mine", "training/loss.png": b"\x89PNG", "manifest.json": b"{}"}
    store(hub, {file.name: file.read_bytes(), "tokenizer.json": tiny_tokenizer_file.read_bytes(), **papers})
    loaded = load_model("alice/nano", device="cpu")
    assert (loaded.provenance.kind, loaded.provenance.sha256) == ("hub", file_sha256(file))
    assert loaded.config == config
    assert loaded.tokenizer.data == tiny_tokenizer_file.read_bytes()
    assert not hub.sent("README|png|manifest")
    local, ids = load_model(file, device="cpu"), torch.tensor([[5, 7, 1]])
    assert torch.equal(loaded.model(ids), local.model(ids))
    unplug(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_model("alice/nano", device="cpu").provenance.sha256 == loaded.provenance.sha256


def test_several_gguf_files_are_a_question_and_nothing_is_fetched(hub: Hub) -> None:
    store(hub, {"a-Q8_0.gguf": b"GGUF", "b-F16.gguf": b"GGUF", "tokenizer.json": b"{}"})
    with pytest.raises(DataError, match=r"2 GGUF files \(a-Q8_0\.gguf, b-F16\.gguf\)"):
        load_model("alice/nano")
    assert not hub.sent("GET .*(resolve|cdn)")


def test_a_published_folder_of_hugging_face_is_a_model(hub: Hub, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    """Also when a GGUF file lies beside it: that one stays where it is."""
    reference(vocab_size=512).save_pretrained(tmp_path / "hf")
    shutil.copy(tiny_tokenizer_file, tmp_path / "hf")
    store(hub, {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} | {"x.gguf": b"GGUF"})
    loaded = load_model("alice/nano", device="cpu")
    assert loaded.provenance.sha256 == file_sha256(tmp_path / "hf" / "model.safetensors")
    assert loaded.config.vocab_size == json.loads((tmp_path / "hf" / "config.json").read_bytes())["vocab_size"]
    assert not hub.sent("x.gguf")


def test_a_repository_that_is_not_there_is_a_network_error(hub: Hub) -> None:
    with pytest.raises(NetworkError, match="alice/nothing"):
        load_model("alice/nothing")
