"""Models on the Hub, with the Hub's real client against a Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Files, Hub, Repo, hub_with_client
from huggingface_hub import constants
from safetensors.torch import save, save_file
from small_models import GGUF_CONFIG, hf_weights, reference, write_gguf

from resmol.errors import CheckpointError, DataError, NetworkError
from resmol.interop.hf_folder import WEIGHTS, find_weights
from resmol.interop.load import load_model
from resmol.system import hub_download as module
from resmol.system.atomic_io import file_sha256
from resmol.system.hub_download import hub_file, hub_names, hub_tensors, is_hub_id
from resmol.system.safetensors_header import read_header

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


# --- headers -------------------------------------------------------------------------------------------------


def test_headers_are_read_and_the_weights_are_not(hub: Hub, tmp_path: Path) -> None:
    save_file({"a": torch.ones(300, 1000), "b": torch.ones(7, dtype=torch.bfloat16)}, tmp_path / WEIGHTS)
    store(hub, {WEIGHTS: (tmp_path / WEIGHTS).read_bytes()})
    assert hub_tensors("alice/nano", fix=FIX) == read_header(tmp_path / WEIGHTS).tensors
    assert 0 < hub.bytes_sent <= 100_001 < (tmp_path / WEIGHTS).stat().st_size


def test_headers_of_shards_are_read_as_one(hub: Hub, tmp_path: Path) -> None:
    reference().save_pretrained(tmp_path, max_shard_size="10KB")
    store(hub, {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()})
    assert hub_tensors("alice/nano", fix=FIX) == find_weights(tmp_path).tensors


def test_a_revision_has_headers_of_its_own(hub: Hub) -> None:
    old = store(hub, {WEIGHTS: save({"a": torch.ones(2)})})
    store(hub, {WEIGHTS: save({"b": torch.ones(2)})})
    assert list(hub_tensors("alice/nano", revision=old, fix=FIX)) == ["a"]
    assert list(hub_tensors("alice/nano", fix=FIX)) == ["b"]


@pytest.mark.parametrize(
    "entry",
    ['{"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}', '{"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}',
     '{"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}', '{"dtype": "F32"}', '"\xff"', "}"],
)  # fmt: skip
def test_a_malformed_header_is_a_checkpoint_error(hub: Hub, entry: str) -> None:
    text = f'{{"a": {entry}}}'.encode()
    store(hub, {WEIGHTS: len(text).to_bytes(8, "little") + text + bytes(8)})
    with pytest.raises((CheckpointError, NetworkError), match="alice/nano"):
        hub_tensors("alice/nano", fix=FIX)


def test_a_repository_without_headers_is_a_network_error(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    store(hub, {"config.json": b"{}"})
    with pytest.raises(NetworkError, match="did not give the headers of alice/nano"):
        hub_tensors("alice/nano", fix=FIX)
    unplug(monkeypatch)
    with pytest.raises(NetworkError, match="cannot be reached"):
        hub_tensors("alice/nano", fix=FIX)


def test_headers_that_never_end_are_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    store(hub, {WEIGHTS: save({"a": torch.ones(2)})})
    monkeypatch.setattr(module, "ALL_HEADERS_SECONDS", 0.2)
    hub.breaks = lambda request: released.wait(10) and None if request.startswith("GET /cdn") else None
    with pytest.raises(NetworkError, match="no answer within"):
        hub_tensors("alice/nano", fix=FIX)
    released.set()


@pytest.mark.parametrize("broken", ["GET", ""])
def test_a_password_in_the_address_of_the_hub_is_not_shown(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    address = hub.endpoint.replace("//", "//user:s3cr3t@w0rd@")
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.endpoint, address)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    hub.breaks = lambda request: 503 if request.startswith(broken) else None
    for ask in (hub_tensors, hub_names):
        with pytest.raises(NetworkError) as caught:
            ask("alice/nano", fix=FIX)
        assert not re.search("s3cr3t|w0rd", f"{caught.value.what} {caught.value.fix}"), caught.value.what


# --- a model -------------------------------------------------------------------------------------------------


def test_a_published_gguf_folder_is_a_model(
    hub: Hub, tmp_path: Path, tiny_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its one GGUF file and its tokenizer come, and nothing else; later also without a connection."""
    config = GGUF_CONFIG.model_copy(update={"vocab_size": 512})
    file = write_gguf(tmp_path / "mine-F32.gguf", config, hf_weights(config))
    papers = {"README.md": b"# Mine", "training/loss.png": b"\x89PNG", "manifest.json": b"{}"}
    store(hub, {file.name: file.read_bytes(), "tokenizer.json": tiny_tokenizer_file.read_bytes(), **papers})
    loaded = load_model("alice/nano", device="cpu")
    assert (loaded.source.kind, loaded.source.sha256) == ("hub", file_sha256(file))
    assert loaded.config == config
    assert loaded.tokenizer.data == tiny_tokenizer_file.read_bytes()
    assert not hub.sent("README|png|manifest")
    local, ids = load_model(file, device="cpu"), torch.tensor([[5, 7, 1]])
    assert torch.equal(loaded.model(ids), local.model(ids))
    unplug(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_model("alice/nano", device="cpu").source.sha256 == loaded.source.sha256


def test_several_gguf_files_are_a_question_and_nothing_is_fetched(hub: Hub) -> None:
    store(hub, {"a-Q8_0.gguf": b"GGUF", "b-F16.gguf": b"GGUF", "tokenizer.json": b"{}"})
    with pytest.raises(DataError, match=r"2 GGUF models \(a-Q8_0\.gguf, b-F16\.gguf\)"):
        load_model("alice/nano")
    assert not hub.sent("GET .*(resolve|cdn)")


def test_a_published_folder_of_hugging_face_is_a_model(hub: Hub, tmp_path: Path, tiny_tokenizer_file: Path) -> None:
    """Also when a GGUF file lies beside it: that one stays where it is."""
    reference(vocab_size=512).save_pretrained(tmp_path / "hf")
    shutil.copy(tiny_tokenizer_file, tmp_path / "hf")
    store(hub, {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} | {"x.gguf": b"GGUF"})
    loaded = load_model("alice/nano", device="cpu")
    assert loaded.source.sha256 == file_sha256(tmp_path / "hf" / "model.safetensors")
    assert loaded.config.vocab_size == json.loads((tmp_path / "hf" / "config.json").read_bytes())["vocab_size"]
    assert not hub.sent("x.gguf")


def test_a_repository_that_is_not_there_is_a_network_error(hub: Hub) -> None:
    with pytest.raises(NetworkError, match="alice/nothing"):
        load_model("alice/nothing")
