"""An interrupted preparation goes on where it was, and its result is that of one that was never interrupted."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import synthetic_texts

from resmol.data.prepare import prepare
from resmol.data.readers import Corpus, read_inputs, with_held_out
from resmol.data.shard_writer import SplitWriter
from resmol.data.shards import Dataset
from resmol.data.text_file import ReadOptions
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError

KILLED = """
import os, signal, sys
from pathlib import Path
from resmol.data import chunking, saved_state, text_stream
from resmol.data.prepare import prepare
from resmol.data.readers import read_inputs
from resmol.data.shard_writer import SplitWriter
from resmol.data.tokenizer import load_tokenizer

folder, text, vocabulary = map(Path, sys.argv[1:])
saved_state.SAVE_SECONDS, text_stream.BATCH_BYTES, chunking.PIECE_CHARACTERS = 0.0, 300, 400
append = SplitWriter.append

def killing(writer, ids):
    append(writer, ids)
    if (folder / "out.unfinished/data/train/00001.ds").exists() and writer.tokens > 1500:
        os.kill(os.getpid(), signal.SIGKILL)

SplitWriter.append = killing
prepare(folder / "out", read_inputs([text]), load_tokenizer(str(vocabulary)), val_fraction=0.1, shard_tokens=1000)
"""


@pytest.fixture(autouse=True)
def small_and_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of a few hundred bytes, each of which is followed by a save."""
    monkeypatch.setattr("resmol.data.saved_state.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("resmol.data.saved_state.SAVE_SHARE", 1e9)
    monkeypatch.setattr("resmol.data.text_stream.BATCH_BYTES", 300)
    monkeypatch.setattr("resmol.data.chunking.PIECE_CHARACTERS", 400)
    monkeypatch.setattr("resmol.data.duplicates.RECENT", 4)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of several formats: copies, nulls, invalid bytes, a long document, a file that is not used."""
    folder = tmp_path / "in"
    folder.mkdir()
    some = synthetic_texts(24)
    lines = "".join(
        json.dumps({"text": text}) + "\n" for text in [*some[:8], None, "", some[0], "привет 漢字", "a<|endoftext|>b"]
    )
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    pq.write_table(pa.table({"text": [*some[8:16], None, some[1]]}), folder / "b.parquet", row_group_size=3)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    long = " ".join(synthetic_texts(9, seed=1))
    (folder / "d.txt").write_bytes(long.encode() + b" \xff")
    (folder / "g.jsonl").write_text(json.dumps({"text": f"{long} \ufffd"}), encoding="utf-8")
    (folder / "e.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in some[16:]), encoding="utf-8")
    (folder / "f.bin").touch()
    return folder


def differing(one: Path, other: Path) -> list[str]:
    """Return the names of the files that two folders do not have alike."""
    files = {file.relative_to(folder) for folder in (one, other) for file in folder.rglob("*") if not file.is_dir()}
    both = [name for name in files if (one / name).is_file() and (other / name).is_file()]
    return [str(name) for name in files if name not in both or (one / name).read_bytes() != (other / name).read_bytes()]


def interrupted(monkeypatch: pytest.MonkeyPatch, appends: int, attempt: Callable[[], Dataset]) -> Dataset | None:
    """Attempt it with Ctrl-C in the middle of the n-th write; None if it came so far."""
    left, whole = iter(range(appends)), SplitWriter.append

    def append(self: SplitWriter, ids: np.ndarray) -> None:
        whole(self, ids)
        if next(left, None) is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "append", append)
        try:
            return attempt()
        except KeyboardInterrupt:
            return None


@pytest.mark.parametrize("how", [{}, {"dedup": True}, {"max_tokens": 1500}, {"val": True, "val_fraction": 0.0}])
def test_it_is_interrupted_again_and_again(
    texts: Path, how: dict[str, object], tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time after another number of writes, within a batch, a document, a file, a shard."""
    more = dict(how)
    inputs = [texts / name for name in ("a.jsonl", "c.jsonl.gz")] if more.pop("val", False) else None

    def attempt(out: str) -> Dataset:
        corpus = read_inputs([texts])
        if inputs is not None:
            corpus = with_held_out(read_inputs([texts / "d.txt"]), read_inputs(inputs))
        options = {"val_fraction": 0.1, "shard_tokens": 400, **more}
        return prepare(tmp_path / out, corpus, tiny_tokenizer, **options)

    straight, attempts, encoded = attempt("straight"), 0, []
    encode = tiny_tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda _self, batch: encoded.extend(batch) or encode(batch))
    while (resumed := interrupted(monkeypatch, 15 + attempts, lambda: attempt("out"))) is None:
        attempts += 1
    assert attempts > 2
    assert differing(resumed.root, straight.root) == []
    assert sum(map(len, encoded)) < 1.6 * straight.manifest.source.statistics.characters
    assert {path.name for path in tmp_path.iterdir()} == {"in", "straight", "out"}


def test_a_process_is_killed_in_the_middle_of_the_second_shard(
    texts: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, messages: list[str]
) -> None:
    vocabulary = tmp_path / "tokenizer.json"
    vocabulary.write_bytes(tiny_tokenizer.data)
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(texts), str(vocabulary)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    options = {"val_fraction": 0.1, "shard_tokens": 1000}
    resumed = prepare(tmp_path / "out", read_inputs([texts]), tiny_tokenizer, **options)
    assert any(message.startswith("data: going on after ") for message in messages)
    straight = prepare(tmp_path / "straight", read_inputs([texts]), tiny_tokenizer, **options)
    assert differing(resumed.root, straight.root) == []


@pytest.fixture
def kept(
    texts: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Dataset]]:
    """Prepare, after an attempt that left two shards and a half."""

    def attempt(corpus: Corpus | None = None, **more: object) -> Dataset:
        options = {"val_fraction": 0.1, "shard_tokens": 400, **more}
        return prepare(tmp_path / "out", corpus or read_inputs([texts]), tiny_tokenizer, **options)

    assert interrupted(monkeypatch, 60, attempt) is None
    assert (tmp_path / "out.unfinished" / "data" / "train" / "00002.ds").exists()
    yield attempt
    straight = prepare(tmp_path / "straight", read_inputs([texts]), tiny_tokenizer, val_fraction=0.1, shard_tokens=400)
    assert differing(tmp_path / "out" / "train", straight.root / "train") == []


@pytest.mark.parametrize("name", ["state", "data/train/00000.ds", "data/train/00001.ds.index", "data/train/00002.ds"])
def test_a_flipped_byte_in_kept_work_is_noticed(
    name: str, kept: Callable[..., Dataset], tmp_path: Path, messages: list[str]
) -> None:
    file = tmp_path / "out.unfinished" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    kept()
    (message,) = [one for one in messages if "starting over" in one]
    assert f"{Path(name).name.removesuffix('.index')} is damaged" in message


def test_a_changed_option_starts_over(kept: Callable[..., Dataset], texts: Path, messages: list[str]) -> None:
    kept(read_inputs([texts], ReadOptions(text_field="text,content")))
    assert any("(it was begun with another text_field): starting over" in message for message in messages)


def test_a_changed_text_starts_over_and_a_repaired_one_goes_on(
    kept: Callable[..., Dataset], texts: Path, messages: list[str]
) -> None:
    whole = (texts / "e.csv").read_bytes()
    (texts / "e.csv").write_bytes(whole + b'"broken\n')
    with pytest.raises(DataError, match=r"e\.csv"):
        kept()
    assert any("the same command goes on after " in message for message in messages)
    (texts / "e.csv").write_bytes(whole)
    content = (texts / "a.jsonl").read_bytes()
    (texts / "a.jsonl").write_bytes(content.replace(b"the", b"THE", 1))
    kept()
    assert any("(the text has changed): starting over" in message for message in messages)
