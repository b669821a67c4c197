"""Data sets of the Hub, read by its real client from a Hub on loopback that fails, stalls and cuts answers short."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Files, Hub, Repo, hub_with_client
from huggingface_hub import constants
from tiny import synthetic_texts

from resmol.data import remote_files
from resmol.data.chunking import ReadCounts
from resmol.data.prepare import Progress, prepare
from resmol.data.readers import input_facts, read_inputs
from resmol.data.resolve import check_same_inputs
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError, NetworkError, UsageError

TEXTS = synthetic_texts(60)
ADDRESS = "hf://datasets/alice/texts"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(remote_files, "FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(remote_files, "BLOCK_BYTES", 1500)
    with hub_with_client(tmp_path, monkeypatch) as server:
        store(server, {
            "data/train-0.parquet": parquet(TEXTS[:30]), "data/train-1.parquet": parquet(TEXTS[30:]),
            "more/a.jsonl.gz": gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()),
            "README.md": b"# Texts",
        })  # fmt: skip
        yield server


def parquet(texts: list[str]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "score": [1.0] * len(texts)}), out, row_group_size=10)
    return out.getvalue()


def store(hub: Hub, files: Files, name: str = "alice/texts") -> str:
    hub.objects |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}
    return hub.repos.setdefault(f"datasets/{name}", Repo(False, None)).commit(files, "as the test wants it")


def texts_of(address: str) -> list[str]:
    return ["".join(document.pieces) for document in read_inputs([address]).read(ReadCounts())]


def test_a_data_set_is_read_at_the_commit_that_its_revision_meant(
    hub: Hub, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    commit = hub.repos["datasets/alice/texts"].head
    corpus = read_inputs([f"{ADDRESS}/data/*.parquet"])
    store(hub, {"data/train-0.parquet": parquet(["pushed meanwhile"])})
    dataset = prepare(tmp_path / "out", corpus, tiny_tokenizer)
    (facts,) = dataset.manifest.source.inputs
    assert (facts.name, facts.files) == (f"{ADDRESS}@{commit}/data/*.parquet", 2)
    (tmp_path / "a.parquet").write_bytes(parquet(TEXTS))
    assert (
        dataset.fingerprint
        == prepare(tmp_path / "b", read_inputs([tmp_path / "a.parquet"]), tiny_tokenizer).fingerprint
    )
    check_same_inputs(dataset, f"{ADDRESS}@{commit}/data/*.parquet")
    with pytest.raises(DataError, match="prepared from another text"):
        check_same_inputs(dataset, f"{ADDRESS}/data/*.parquet")
    assert input_facts(f"{ADDRESS}@{commit}/data/*.parquet") == facts


def test_an_interrupted_preparation_does_not_fetch_finished_files_again(
    hub: Hub, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resmol.data.saved_state.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("resmol.data.saved_state.SAVE_SHARE", 1e9)
    monkeypatch.setattr("resmol.data.text_stream.BATCH_BYTES", 300)
    corpus, fetched = read_inputs([f"{ADDRESS}/data"]), list[str]()
    hub.breaks = lambda request: fetched.append(request) if request.startswith("GET /cdn") else None

    def stop_in_the_second_file(progress: Progress) -> None:
        if progress.documents >= 45:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", corpus, tiny_tokenizer, on_progress=stop_in_the_second_file)
    first = set(fetched)
    fetched.clear()
    resumed = prepare(tmp_path / "out", corpus, tiny_tokenizer)
    assert (len(first), len(first & set(fetched))) == (2, 1)
    assert resumed.manifest == prepare(tmp_path / "straight", corpus, tiny_tokenizer).manifest


@pytest.mark.parametrize("path", ["more/a.jsonl.gz", "data", "data/train-*.parquet"])
def test_a_file_a_folder_and_a_pattern_hold_the_same_texts(hub: Hub, path: str) -> None:
    assert texts_of(f"{ADDRESS}/{path}") == TEXTS


@pytest.mark.parametrize(
    ("fault", "path"),
    [("before", "data"), ("half", "data"), ("half", "more/a.jsonl.gz"), (503, "data"), ("stall", "more/a.jsonl.gz")],
)
def test_a_download_that_fails_stalls_or_is_cut_short_goes_on(
    hub: Hub, path: str, fault: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each third answer of the store fails, in the middle of the files."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    released, asked = threading.Event(), []

    def breaks(request: str) -> str | int | None:
        if not request.startswith("GET /cdn"):
            return None
        asked.append(request)
        if len(asked) % 3 != 2:
            return None
        if fault == "stall":
            released.wait(20)
        return "before" if fault == "stall" else fault

    hub.breaks = breaks
    assert texts_of(f"{ADDRESS}/{path}") == TEXTS
    released.set()
    assert len(asked) >= 3


def test_a_download_that_never_succeeds_says_where_it_stopped(hub: Hub, messages: list[str]) -> None:
    hub.breaks = lambda request: "half" if request.startswith("GET /cdn") else None
    with pytest.raises(NetworkError, match=r"a\.jsonl\.gz: reading failed 5 times at byte 0"):
        texts_of(f"{ADDRESS}/more/a.jsonl.gz")
    assert sum("trying again" in message for message in messages) == 4


def test_what_is_missing_private_or_gated_is_a_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for address, what in (
        ("hf://datasets/alice/nothing/a.parquet", "the Hub has no such data set"),
        (f"{ADDRESS}@nothing/data", "the Hub has no such revision"),
        (f"{ADDRESS}/elsewhere/*.parquet", "there is no text at hf://datasets/alice/texts@[0-9a-f]{40}/elsewhere"),
    ):
        with pytest.raises(DataError, match=what):
            read_inputs([address])
    with pytest.raises(UsageError, match="is no data set of the Hub"):
        read_inputs(["hf://alice/texts"])
    hub.gated.add("datasets/alice/texts")
    with pytest.raises(NetworkError, match="is gated") as caught:
        texts_of(f"{ADDRESS}/data")
    assert "https://huggingface.co/datasets/alice/texts in the browser" in caught.value.fix


def test_other_file_systems_need_their_package_or_a_name_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(UsageError, match="s3:// needs a package that is not installed") as caught:
        read_inputs(["s3://bucket/a.parquet"])
    assert "[s3]" in caught.value.fix
    with pytest.raises(UsageError, match="nonsense:// is no file system"):
        read_inputs(["nonsense://a"])


def test_any_file_system_of_fsspec_is_read(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/texts/b.parquet": parquet(TEXTS[30:]), "/texts/a.parquet": parquet(TEXTS[:30])})
    assert texts_of("memory://texts/*.parquet") == TEXTS


def test_a_pattern_names_local_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert texts_of(str(tmp_path / "*.txt")) == ["a", "b"]
