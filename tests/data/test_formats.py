"""What a file is, by its content and its name: each format by bytes as its own tools write them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from resmol.data.format_signatures import BINARY_SIGNS, TEXT_SIGNS, UnsupportedFormat
from resmol.data.formats import HEAD_BYTES, recognize

TEXT = b"A line of plain text.\n" * 200


def zipped(name: str, content: bytes = TEXT) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return out.getvalue()


def tarred(kind: int) -> bytes:
    out, info = io.BytesIO(), tarfile.TarInfo("plain.txt")
    info.size = len(TEXT)
    with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
        archive.addfile(info, io.BytesIO(TEXT))
    return out.getvalue()


def old_tar() -> bytes:
    """A tar of before POSIX has no magic number, only the checksum of its header."""
    content = bytearray(tarred(tarfile.USTAR_FORMAT))
    content[257:512] = bytes(255)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    return bytes(content)


def database(tmp: Path) -> bytes:
    with sqlite3.connect(tmp / "a.db") as connection:
        connection.execute("create table texts (text)")
    connection.close()
    return (tmp / "a.db").read_bytes()


def array() -> bytes:
    out = io.BytesIO()
    np.save(out, np.arange(1000))
    return out.getvalue()


def safetensors() -> bytes:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + bytes(4)


def label(value: object) -> str:
    """Name a case without its bytes, in which an archive keeps the time of its making."""
    return value if isinstance(value, str) else "bytes"


def name_of(kind: object) -> str:
    assert isinstance(kind, UnsupportedFormat)
    assert kind.fix
    return kind.name


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (zipped("plain.txt"), "a ZIP archive"),
        (zipped("word/document.xml"), "a Word document (docx)"),
        (zipped("archive/data.pkl"), "a PyTorch file"),
        (tarred(tarfile.GNU_FORMAT), "a tar archive"),
        (tarred(tarfile.PAX_FORMAT), "a tar archive"),
        (old_tar(), "a tar archive"),
        (lzma.compress(TEXT), "xz-compressed data"),
        (lzma.compress(TEXT, lzma.FORMAT_ALONE), "LZMA-compressed data"),
        (bz2.compress(TEXT), "bzip2-compressed data"),
        (gzip.compress(TEXT), "gzip-compressed data"),
        (b"\x28\xb5\x2f\xfd" + TEXT, "Zstandard-compressed data"),
        (b"PARE" + bytes(range(256)), "an encrypted Parquet file"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF"),
        (b"\x89PNG\r\n\x1a\n" + bytes(9), "a picture (PNG)"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "a picture (JPEG)"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "a sound (WAV)"),
        (b"GGUF\x03\0\0\0", "a GGUF model"),
        (safetensors(), "a safetensors file"),
        (array(), "a NumPy array"),
        (pickle.dumps(["text"]), "a pickle of Python or PyTorch"),
        (b"\x7fELF\x02\x01\x01\0", "a program (ELF)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS and not the file itself"),
        (b"\0\x05\x16\x07Mac OS X", "what macOS keeps beside a file (AppleDouble)"),
        (np.arange(5000, dtype="<i4").tobytes(), "binary data"),
        (np.random.default_rng(1).integers(0, 256, 5000, np.uint8).tobytes(), "binary data"),
        ("plain text\n".encode("utf-16-le") * 9, "text in utf-16-le without a byte order mark"),
        ("plain text\n".encode("utf-16-be") * 9, "text in utf-16-be without a byte order mark"),
    ],
    ids=label,
)
@pytest.mark.parametrize("wanted", ["auto", "text"])
def test_what_is_no_text_is_named_whatever_its_name_and_the_wish(content: bytes, expected: str, wanted: str) -> None:
    for name in ("corpus.txt", "corpus.jsonl", "corpus", "-"):
        assert name_of(recognize(name, content[:HEAD_BYTES], wanted)) == expected


def test_a_database_is_named(tmp_path: Path) -> None:
    assert name_of(recognize("a.txt", database(tmp_path))) == "an SQLite database"


@pytest.mark.parametrize(("_offset", "sign"), [(offset, sign) for offset, sign, _, _ in BINARY_SIGNS])
def test_letters_at_the_place_of_a_sign_make_no_format(_offset: int, sign: bytes) -> None:
    if sign.isalnum():
        assert recognize("a.txt", b"x" * _offset + sign + b" begins this text.\n") == "text"


def test_every_sign_has_its_own_sentence() -> None:
    assert all(fix for *_, fix in (*BINARY_SIGNS, *TEXT_SIGNS))
    signs = [(offset, sign) for offset, sign, _, _ in BINARY_SIGNS]
    assert len(set(signs)) == len(signs)


LINES = b'{"id": 1, "text": "one"}\n{"id": 2, "text": "two"}\n'


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonlines", "a.jl", "A.JSON", "a.txt", "a", "-"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\r\n \n"])
def test_json_lines_are_recognized_under_any_name(name: str, mark: bytes) -> None:
    assert recognize(name, mark + LINES) == "jsonl"
    assert recognize(name, mark + LINES, "text") == "text"
    assert recognize(name, mark + LINES.replace(b"\n", b"\r\n")) == "jsonl"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_json_lines_are_recognized_in_other_encodings(encoding: str) -> None:
    assert recognize("a.json", LINES.decode().encode(encoding)) == "jsonl"
    assert recognize("a.txt", LINES.decode().encode(encoding)) == "jsonl"
    assert recognize("a.txt", "plain text".encode(encoding)) == "text"


def test_a_json_line_longer_than_the_head_is_recognized() -> None:
    long = json.dumps({"text": "x" * 2 * HEAD_BYTES}).encode()
    for name in ("a.json", "a.txt", "-"):
        assert recognize(name, long[:HEAD_BYTES]) == "jsonl"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", json.dumps([{"text": "one"}]).encode(), "a JSON array, not one object on each line"),
        ("a.txt", json.dumps([{"text": "one"}], indent=1).encode(), "a JSON array, not one object on each line"),
        ("a.json", b'["one", "two"]', "a JSON array, not one object on each line"),
        ("a.json", json.dumps({"a": 1}, indent=2).encode(), "one JSON object over several lines, not one on each line"),
        (
            "a.ipynb",
            json.dumps({"a": 1}, indent=1).encode(),
            "one JSON object over several lines, not one on each line",
        ),
        ("a.txt", b"\n<!DOCTYPE html>\n<html>", "a web page (HTML)"),
        ("a.txt", b"<?xml version='1.0'?>", "an XML file"),
        ("a.txt", b"WARC/1.0\r\n", "a web archive (WARC)"),
    ],
    ids=label,
)
def test_text_in_another_structure_is_refused_unless_it_is_wanted(name: str, content: bytes, expected: str) -> None:
    assert name_of(recognize(name, content)) == expected
    assert recognize(name, content, "text") == "text"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"PAR1" + bytes(range(256)), "parquet"),
        ("a.txt", b"ARROW1\0\0" + bytes(100), "arrow"),
        ("a.txt", b"\xff\xff\xff\xff\x10\x01\0\0", "arrow-stream"),
        ("a.csv", b"id,text\n1,one\n", "csv"),
        ("a.TSV", b"id\ttext\n1\tone\n", "csv"),
    ],
    ids=label,
)
def test_tables_are_recognized(name: str, content: bytes, expected: str) -> None:
    assert recognize(name, content) == expected
    assert recognize(name, content, "text") == ("text" if expected == "csv" else expected)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        TEXT,
        b"{curly} words\n",
        b'{"not": json\nreally',
        b'{"one": 1} is how an object is written.\n',
        b'{"one": 1}\nThat was an object.\n',
        b"[Chorus]\n",
        b"[1] A note.\n",
        b"[[link]]\n",
        b"PK is short for penalty kick.",
        b"PAR1 was a golf course.",
        b"The big WAVE",
        b"# coloured \x1b[31mlog\x1b[0m\n",
        b"a page\x0c\nthe next\n",
        b"one NUL\0" + TEXT,
        "Größe, 漢字, 😀, \u200fעברית".encode(),
        "caf\xe9".encode("latin-1"),
        bytes(range(128, 256)),
    ],
    ids=label,
)
def test_text_is_text(content: bytes) -> None:
    assert recognize("a.txt", content) == "text"
    assert recognize("-", content) == "text"


def test_an_encoding_that_is_named_makes_control_characters_text() -> None:
    content = "plain text\n".encode("utf-16-le") * 9
    assert recognize("a.txt", content, encoding="utf-16-le") == "text"
    assert recognize("a.txt", b"a\0b\0", encoding="utf-8") == "text"


def test_the_command_for_an_array_makes_json_lines(tmp_path: Path) -> None:
    rows = [{"text": "one ☃"}, {"text": "two"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    kind = recognize("a.json", (tmp_path / "a.json").read_bytes())
    assert isinstance(kind, UnsupportedFormat)
    error = kind.refusal("a.json")
    assert "a.json is a JSON array" in error.what
    command = error.fix.partition(": ")[2].replace("python", f"'{sys.executable}'", 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
