from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from profiles import examples

from resmol.data import chunking as text
from resmol.data import json_lines, text_file
from resmol.data.chunking import ReadCounts, cut_into_pieces, decoded, repaired
from resmol.data.readers import Corpus, from_texts, read_inputs
from resmol.data.text_file import ReadOptions
from resmol.errors import DataError


def read_all(corpus: Corpus) -> tuple[dict[str, str], ReadCounts]:
    counts = ReadCounts()
    return {document.name: "".join(document.pieces) for document in corpus.read(counts)}, counts


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# Files, folders, jsonl


def test_files_and_folders_are_documents_in_a_fixed_order(tmp_path):
    write(tmp_path / "b.txt", b"B")
    write(tmp_path / "a" / "z.md", b"Z")
    write(tmp_path / "a" / "y.txt.gz", gzip.compress(b"Y"))
    write(tmp_path / "a" / "x.jsonl", b'{"text": "X1"}\n\n{"text": "X2"}')
    write(tmp_path / "a" / "skipped.py", b"no")
    write(tmp_path / "a" / ".hidden.txt", b"no")
    texts, counts = read_all(read_inputs([tmp_path, tmp_path / "b.txt"]))
    assert list(texts.items()) == [
        ("x.jsonl:1", "X1"),
        ("x.jsonl:3", "X2"),
        ("y.txt.gz", "Y"),
        ("z.md", "Z"),
        ("b.txt", "B"),
    ]
    assert [(one.files, one.name) for one in counts.inputs] == [(4, tmp_path.name), (1, "b.txt")]


def test_bytes_and_hash_are_those_on_the_disk(tmp_path):
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"hello" * 1000))
    corpus = read_inputs([path])
    _, counts = read_all(corpus)
    facts = counts.inputs[0].facts()
    assert corpus.bytes_total == counts.bytes_read == facts.bytes == path.stat().st_size
    assert facts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_all(corpus)[0] == read_all(corpus)[0] == {"a.txt.gz": "hello" * 1000}


def test_standard_input_is_a_document(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"from a pipe")))
    corpus = read_inputs(["-"])
    assert corpus.bytes_total is None
    assert read_all(corpus)[0] == {"-": "from a pipe"}


def test_another_field_of_jsonl(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"content": "hello", "text": 3}\r\n')
    assert read_all(read_inputs([path], ReadOptions(text_field="content")))[0] == {"a.jsonl:1": "hello"}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["text"]', "text in 'text'"),
        (b'{"body": "x"}', "text in 'text'"),
        (b"1" * 10_000, "not JSON"),
        (b"\xff", "not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, why):
    path = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=f"line 2: .*{why}"):
        read_all(read_inputs([path]))


def test_a_giant_jsonl_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 1000)
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "x" * 1000}).encode())
    with pytest.raises(DataError, match="line 1: it is longer"):
        read_all(read_inputs([path]))


@pytest.mark.parametrize("paths", [[], ["missing.txt"], ["empty-folder"]])
def test_nothing_to_read_is_an_error(tmp_path, monkeypatch, paths):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty-folder").mkdir()
    with pytest.raises(DataError) as caught:
        read_inputs(paths)
    assert caught.value.exit_code == 3
    assert caught.value.fix


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"not gzip", lambda data: data[:20] + b"\0" * 20]
)
def test_a_damaged_archive_is_an_error(tmp_path, damage):
    path = write(tmp_path / "a.txt.gz", damage(gzip.compress(b"A line of text.\n" * 500)))
    with pytest.raises(DataError, match="cannot be read"):
        read_all(read_inputs([path]))


def test_a_file_that_vanishes_is_an_error(tmp_path):
    path = write(tmp_path / "a.txt", b"x")
    corpus = read_inputs([path])
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_all(corpus)


# Odd text


@pytest.mark.parametrize(
    ("data", "expected", "replaced"),
    [
        (b"\xef\xbb\xbfmark", "mark", 0),
        (b"mark\xef\xbb\xbf", "mark\ufeff", 0),
        (b"a\r\nb\rc\n", "a\r\nb\rc\n", 0),
        (b"nul\0", "nul\0", 0),
        (b"\xff\xf0a", "\ufffd\ufffda", 2),
        (b"caf\xe9", "caf\ufffd", 1),
        (b"cut \xf0\x9f\x98", "cut \ufffd\ufffd\ufffd", 3),
        (b"cesu \xed\xa0\xbd", "cesu \ufffd\ufffd\ufffd", 3),
        ("…😀".encode(), "…😀", 0),
    ],
)
@pytest.mark.parametrize("read_bytes", [1 << 18, 1])
def test_odd_bytes_are_repaired_and_counted(tmp_path, monkeypatch, data, expected, replaced, read_bytes):
    monkeypatch.setattr(text_file, "_READ_BYTES", read_bytes)
    texts, counts = read_all(read_inputs([write(tmp_path / "a.txt", data)], ReadOptions(encoding="utf-8")))
    assert texts == {"a.txt": expected}
    assert counts.replacements == replaced
    assert counts.replaced_in == (["a.txt"] if replaced else [])


def test_lone_surrogates_in_json_are_replaced_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", rb'{"text": "a \ud800 b \ud83d\ude00"}')
    texts, counts = read_all(read_inputs([path]))
    assert texts == {"a.jsonl:1": "a \ufffd b 😀"}
    assert counts.replacements == 1


@given(st.binary(max_size=200), st.integers(1, 7))
def test_valid_text_is_kept_and_chunks_make_no_difference(data, size):
    whole, parts = ReadCounts(), ReadCounts()
    one = "".join(repaired(decoded([data]), whole))
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    assert one == "".join(repaired(decoded(chunks), parts))
    assert whole.replacements == parts.replacements
    valid = data.decode("utf-8", errors="ignore")
    assert one.replace("\ufffd", "") == valid.replace("\ufffd", "")


# Pieces

TEXT = st.text(
    st.one_of(
        st.sampled_from(" \n\t\r\x0b\x1c\x1f\x85\xa0\u180e\u2003\u3000'’0189abcst.,!_é漢字かカー、。，！😀\u0301"),
        st.characters(codec="utf-8"),
    ),
    max_size=120,
)


@examples(300)
@given(TEXT, st.integers(2, 16))
@example("漢、字。か！、カ，a", 2)
@example("a\x1c b\u180e c d'\u2019s  1 2  \n\n x", 2)
def test_ids_of_the_pieces_are_the_ids_of_the_whole(request, tiny_tokenizer, document, size):
    original = text.PIECE_CHARACTERS
    text.PIECE_CHARACTERS = size
    try:
        counts = ReadCounts()
        pieces = list(cut_into_pieces([document], counts))
    finally:
        text.PIECE_CHARACTERS = original
    assert "".join(pieces) == document
    assert counts.forced_cuts == 0
    assert list(chain.from_iterable(tiny_tokenizer.encode_batch(pieces))) == tiny_tokenizer.encode(document)


def test_ids_of_the_pieces_with_the_genuine_tokenizer(genuine_tokenizer, shared_dir, monkeypatch):
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 300)
    for path in sorted((shared_dir / "data" / "unicode").iterdir()):
        document = path.read_bytes().decode("utf-8", errors="replace")[:300_000]
        pieces = list(cut_into_pieces([document], ReadCounts()))
        assert len(pieces) > len(document) // 3000
        assert list(chain.from_iterable(genuine_tokenizer.encode_batch(pieces))) == genuine_tokenizer.encode(document)


def test_pieces_are_bounded_whatever_the_text(monkeypatch):
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(text, "HARD_CUT_CHARACTERS", 1000)
    counts = ReadCounts()
    pieces = list(cut_into_pieces(["x" * 700] * 4 + [" y" * 500], counts))
    assert "".join(pieces) == "x" * 2800 + " y" * 500
    assert max(map(len, pieces)) == 1000
    assert [len(piece) for piece in pieces[:4]] == [1000, 1000, 800, 100]
    assert counts.forced_cuts == 2


def test_a_giant_text_in_one_chunk_is_not_copied_over_and_over():
    pieces = list(cut_into_pieces(["word " * 4_000_000], ReadCounts()))
    assert sum(map(len, pieces)) == 20_000_000
    assert max(map(len, pieces)) <= text.PIECE_CHARACTERS


def test_texts_of_a_program_are_a_corpus():
    texts, counts = read_all(from_texts(["one", "", "thr\ud800ee"]))
    assert texts == {"texts[0]": "one", "texts[1]": "", "texts[2]": "thr\ufffdee"}
    assert counts.replacements == 1
