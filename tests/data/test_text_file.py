"""Files as users have them: under odd names, in other encodings, packed, or no text at all."""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from resmol.data import text_file
from resmol.data.chunking import ReadCounts
from resmol.data.readers import input_facts, read_inputs
from resmol.data.text_file import ReadOptions
from resmol.errors import DataError, UsageError

ROWS = [{"id": number, "text": f"Text {number}, naïve 漢字 😀\nsecond line"} for number in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TEXTS = [row["text"] for row in ROWS]


def texts_of(path: object, **options: object) -> list[str]:
    return read(path, **options)[0]


def read(path: object, **options: object) -> tuple[list[str], ReadCounts]:
    counts = ReadCounts()
    corpus = read_inputs([str(path)], ReadOptions(**options))
    return ["".join(document.pieces) for document in corpus.read(counts)], counts


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.txt", "part-00000"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("packed", [False, True])
def test_json_lines_under_every_name_in_every_encoding(
    name: str, encoding: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_file, "_READ_BYTES", 7)  # cuts characters in two
    content = LINES.encode(encoding)
    path = written(tmp_path, f"{name}.gz" if packed else name, gzip.compress(content) if packed else content)
    texts, counts = read(path)
    assert texts == TEXTS
    assert counts.replacements == 0
    assert counts.inputs[0].facts().bytes == path.stat().st_size
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(path.read_bytes())))
    assert texts_of("-") == TEXTS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be", "cp1252", "gb18030"])
def test_text_in_other_encodings(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_file, "_READ_BYTES", 3)
    text = "漢字 and naïve\r\n" if encoding != "cp1252" else "naïve café\r\n"
    marked = encoding in ("utf-16", "utf-32")
    path = written(tmp_path, "a.txt", text.encode(encoding))
    assert texts_of(path, encoding=None if marked else encoding) == [text]
    assert texts_of(written(tmp_path, "b.txt", text.encode("utf-16")), encoding="cp1252") == [
        text
    ]  # the mark is certain


def test_a_byte_too_few_in_utf_16_is_replaced_and_counted(tmp_path: Path) -> None:
    texts, counts = read(written(tmp_path, "a.txt", ("x" * 100).encode("utf-16") + b"\0"))
    assert texts == ["x" * 100 + "\ufffd"]
    assert (counts.replacements, counts.replaced_in) == (1, ["a.txt"])


@pytest.mark.parametrize("name", ["old.txt", "old.jsonl"])
def test_a_file_that_hardly_decodes_is_refused_and_can_be_forced(name: str, tmp_path: Path) -> None:
    text = "река течёт"
    content = text if name.endswith("txt") else json.dumps({"text": text}, ensure_ascii=False) + "\n"
    path = written(tmp_path, name, content.encode("cp1251"))
    with pytest.raises(DataError, match=r"old.* % of its bytes .* looks like cp1251"):
        texts_of(path)
    assert texts_of(path, encoding="cp1251") == [text]
    assert set("".join(texts_of(path, encoding="utf-8"))) == {"\ufffd", " "}


def test_a_named_file_in_another_format_is_refused(tmp_path: Path) -> None:
    for name, content in (("a.txt.lz4", b"\x04\x22\x4d\x18" + bytes(99)), ("a.txt", b"ORC" + bytes(99))):
        with pytest.raises(DataError, match="is not read as text") as caught:
            texts_of(written(tmp_path, name, content))
        assert str(tmp_path / name) in caught.value.fix
    inner = gzip.compress(gzip.compress(b"text"))
    with pytest.raises(DataError, match="gzip"):
        texts_of(written(tmp_path, "a.txt.gz", inner))


def test_a_folder_leaves_other_formats_out_and_names_them(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    written(folder, "a.txt", b"one")
    written(folder, "b.json", json.dumps({"a": 1}, indent=1).encode())
    written(folder, "c.txt", b"ORC" + bytes(99))
    written(folder, "d/e.py", b"id,text\n")
    texts, counts = read(folder)
    assert texts == ["one"]
    assert counts.inputs[0].files == 1
    assert counts.unused.reasons == {
        "name ends in .py": (1, ["in/d/e.py"]),
        "one JSON object over several lines, not one on each line": (1, ["in/b.json"]),
        "an ORC file": (1, ["in/c.txt"]),
    }


def test_a_folder_without_text_says_what_is_in_it(tmp_path: Path) -> None:
    written(tmp_path, "in/a.orc", b"ORC")
    with pytest.raises(DataError, match=r"holds no text \(not used: 1 \(name ends in .orc\): in/a.orc\)"):
        texts_of(tmp_path / "in")


def test_the_facts_of_an_input_are_those_that_reading_it_counts(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    written(folder, "a.txt", b"one" * 100_000)
    written(folder, "b.jsonl.gz", gzip.compress(LINES.encode()))
    written(folder, "c.txt", b"ORC" + bytes(99))
    written(folder, ".d.txt", b"hidden")
    _, counts = read(folder)
    assert input_facts(folder) == counts.inputs[0].facts()
    assert input_facts(folder / "a.txt").bytes == 300_000


# Fields


@pytest.mark.parametrize(
    ("record", "field", "shown"),
    [
        ({"id": 1, "content": "the text"}, "content", "its fields are id, content"),
        ({"title": "a", "body": "the text"}, "body", "its fields are title, body"),
        ({"data": {"text": "the text", "n": 1}}, "data.text", "its fields are data, data.text"),
    ],
)
def test_the_field_with_the_text_is_offered(record: dict, field: str, shown: str, tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", json.dumps(record).encode() + b"\n")
    with pytest.raises(DataError) as caught:
        texts_of(path)
    assert re.search(f"line 1: .*'text'; {shown}$", caught.value.what)
    assert caught.value.fix.endswith(f"resmol prepare OUT --input '{path}' --text-field {field}")
    assert texts_of(path, text_field=field) == ["the text"]


def test_a_field_whose_name_has_a_dot_comes_first(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", b'{"a.b": "right", "a": {"b": "wrong"}}\n')
    assert texts_of(path, text_field="a.b") == ["right"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": 7}', "in 'text', which holds 7"),
        (b"{}", "it has no fields"),
        (b'"text"', "not an object"),
    ],
)
def test_a_line_without_a_text_is_to_be_repaired(line: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"line 1: .*{words}") as caught:
        texts_of(written(tmp_path, "a.jsonl", line))
    assert caught.value.fix.startswith("repair or drop the line")


def test_options_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="--format is 'tsv'"):
        ReadOptions(format="tsv")
    with pytest.raises(UsageError, match="no text encoding 'utf-9'"):
        ReadOptions(encoding="utf-9")
