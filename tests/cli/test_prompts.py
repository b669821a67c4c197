"""Where prompts come from: all of a file's bad lines at once, every letter as it was written."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmol.cli import prompts as module
from resmol.cli.prompts import decoded, escape_notice, given_prompt, one_line, prompts_from
from resmol.errors import DataError


def feed(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))


def written(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"a\n", "a"), (b"a\r\n", "a"), (b"a\n\n", "a\n"), (b" a\nb ", " a\nb "), (b"", ""), (b"\n", ""), (b"-", "-")],
)
def test_standard_input_loses_one_line_break(content: bytes, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, content)
    assert given_prompt("-") == text


@pytest.mark.parametrize(
    ("text", "letter", "written"),
    [
        ("\\n", "n", "$'\\n'"),
        ("a\\tb", "t", "$'a\\tb'"),
        ("it's\\n", "n", "$'...\\n...'"),
        ("x" * 50 + "\\r", "r", "...\\r..."),
    ],
)
def test_an_escape_is_taken_as_it_is_and_said(text: str, letter: str, written: str) -> None:
    notice = escape_notice("--stop", text)
    assert f"--stop holds a backslash and the letter {letter}" in notice
    assert notice.endswith(f"write --stop {written}") or written in notice


@pytest.mark.parametrize("text", ["", "\n", "a\tb", "n", "C:\\x", "\\"])
def test_without_an_escape_nothing_is_said(text: str) -> None:
    assert escape_notice("--prompt", text) == ""


def test_a_given_prompt_is_taken_as_it_is() -> None:
    assert given_prompt("a\n") == "a\n"
    assert given_prompt("") == ""
    with pytest.raises(DataError, match="--prompt is not UTF-8"):
        given_prompt(b"caf\xe9".decode("utf-8", errors="surrogateescape"))  # as Python hands arguments over


def test_the_first_wrong_byte_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, "é".encode() + b"\xff")
    with pytest.raises(DataError, match="standard input is not UTF-8: byte 3 is 0xff"):
        given_prompt("-")
    with pytest.raises(DataError, match="it is not UTF-8: byte 2 is 0xe9"):
        decoded(b"a\xe9b", "it")


def test_a_prompt_on_each_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"\xef\xbb\xbffirst\r\n\n  \t\n second\xc2\x85still \nlast"
    expected = [("first", "line 1"), (" second\x85still ", "line 4"), ("last", "line 5")]
    found = prompts_from(written(tmp_path, "prompts.txt", content))
    assert [(prompt.text, prompt.place) for prompt in found] == expected
    feed(monkeypatch, content)
    assert prompts_from("-") == found


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_json_lines_hold_any_text(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    content = "\n".join(json.dumps({"id": number, "prompt": text}) for number, text in enumerate(texts))
    found = prompts_from(written(tmp_path_factory.mktemp("prompts"), "prompts.JSONL", content.encode()))
    assert [prompt.text for prompt in found] == texts


def test_all_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    bad = [b"{", b'{"prompt": 5}', b'["prompt"]', b'{"prompt": "\\ud800"}', b'{"prompt": "\xff"}']
    with pytest.raises(DataError) as caught:
        prompts_from(written(tmp_path, "a.jsonl", b"\n".join([b'{"prompt": "fine"}', *bad])))
    for words in (
        "line 2 is not JSON",
        'line 3 has no string "prompt"',
        'line 4 has no string "prompt"',
        "line 5 holds half a character",
        "line 6 is not UTF-8",
    ):
        assert words in caught.value.what
    assert "line 1" not in caught.value.what
    with pytest.raises(DataError, match=r"line 5 is not JSON \(nested too deeply\); and 2 more"):
        prompts_from(written(tmp_path, "b.jsonl", b"\n".join([*[b"{"] * 4, b"[" * 200_000, b"{", b"{"])))


def test_what_holds_no_prompt(tmp_path: Path) -> None:
    for path, words in (
        (str(tmp_path), "is a folder"),
        (str(tmp_path / "missing.txt"), "does not exist"),
        (written(tmp_path, "empty.txt", b" \n\n"), "holds no prompt"),
    ):
        with pytest.raises(DataError, match=words):
            prompts_from(path)


def test_the_size_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1 << 20)
    fits = written(tmp_path, "fits.txt", b"a" * (1 << 20))
    assert len(prompts_from(fits)[0].text) == 1 << 20
    with pytest.raises(DataError, match="larger than 1 MiB"):
        prompts_from(written(tmp_path, "large.txt", b"a" * ((1 << 20) + 1)))


def test_one_line() -> None:
    assert [one_line(text) for text in ("a\r\n", "a\n\r\n", "\na", "a\n")] == ["a", "a\n", "\na", "a"]


def test_byte_order_marks_are_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, records = "first é\r\n漢字\r\n", '{"prompt": "first é"}\r\n{"prompt": "漢字"}\r\n'
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        for name, content in (("a.txt", lines), ("a.jsonl", records)):
            found = prompts_from(written(tmp_path, name, content.encode(encoding)))
            assert [prompt.text for prompt in found] == ["first é", "漢字"]
        feed(monkeypatch, "é\n".encode(encoding))
        assert given_prompt("-") == "é"
    with pytest.raises(DataError, match="is not utf-16-le, which its byte order mark says"):
        prompts_from(written(tmp_path, "cut.txt", "a\nb".encode("utf-16")[:-1]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.txt", "a"])
def test_json_lines_with_prompts_are_recognized(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b'\n{"prompt": "one"}\n{"prompt": "two"}\n'
    assert [prompt.text for prompt in prompts_from(written(tmp_path, name, content))] == ["one", "two"]
    feed(monkeypatch, content)
    assert [prompt.text for prompt in prompts_from("-")] == ["one", "two"]


def test_json_in_a_text_may_be_a_prompt(tmp_path: Path) -> None:
    content = b'{"name": "get", "arguments": {}}\n[{"a": 1}]\n<html>\n'
    found = prompts_from(written(tmp_path, "a.txt", content))
    assert [prompt.text for prompt in found] == content.decode().splitlines()


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.txt", b"PK\x03\x04" + bytes(99), "a ZIP archive"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0), "gzip-compressed data"),
        ("a.txt", "one\ntwo\n".encode("utf-16-le") * 9, "text in utf-16-le without a byte order mark"),
        ("a.json", b'["one", "two"]', "a JSON array"),
        ("a.csv", b"id,prompt\n1,one\n", "a table"),
    ],
)
def test_a_file_of_another_format_is_named(name: str, content: bytes, kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"is {kind}.*, which is not read as prompts") as caught:
        prompts_from(written(tmp_path, name, content))
    assert '.jsonl file an object with a string "prompt"' in caught.value.fix
