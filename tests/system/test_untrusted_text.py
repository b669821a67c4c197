"""Text from outside: strict JSON, short quotes, hidden passwords."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmol.system.untrusted_text import MAX_QUOTED, parse_json, quoted, without_password


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) |
                    st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_every_document_is_read_as_by_the_library(value: object) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' twice"),
        ('[{"b": {"a": 1, "a": 2}}]', "the key 'a' twice"),
        ('{"a": NaN}', "NaN, which is not JSON"),
        ("[-Infinity]", "-Infinity, which is not JSON"),
        (b"\xff{}", "utf-8"),
        ("{", "Expecting"),
    ],
)
def test_what_readers_would_take_differently_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


@given(st.text())
def test_a_quote_is_one_short_line(text: str) -> None:
    assert len(quoted(text)) <= MAX_QUOTED
    assert len(quoted(text).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://user:secret@host:80/a@b failed", "at http://host:80/a@b failed"),
        ("https://user:sec@ret@host", "https://host"),
        ("https://token@host?x=a@b", "https://host?x=a@b"),
        ("two: //a:b@c //d:e@f", "two: //c //f"),
        ("no address: a@b //c d@e", "no address: a@b //c d@e"),
    ],
)
def test_passwords_are_hidden(text: str, shown: str) -> None:
    assert without_password(text) == shown


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_the_byte_order_mark_of_an_editor_is_no_part_of_the_document(encoding: str) -> None:
    assert parse_json('{"a": "é"}'.encode(encoding)) == {"a": "é"}
