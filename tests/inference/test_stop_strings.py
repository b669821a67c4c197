"""Stop strings: compared with reading the text character by character, however it is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from resmol.errors import UsageError
from resmol.inference.stop_strings import StopStrings


def text_before_stop(text: str, strings: list[str]) -> str:
    """Return the text before the stop string that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        if complete := [string for string in strings if text[:end].endswith(string)]:
            return text[: end - max(map(len, complete))]
    return text


@given(pieces=st.lists(st.text("ab", max_size=3), max_size=8), strings=st.lists(st.text("ab", min_size=1), max_size=3))
@example(pieces=["a", "b", "a"], strings=["b", "aba"])  # what comes after "b" would never be generated
@example(pieces=["aba"], strings=["b", "aba"])
def test_the_text_decides_and_not_how_it_is_cut(pieces: list[str], strings: list[str]) -> None:
    text, stop, given_out = "".join(pieces), StopStrings(strings), ""
    expected = text_before_stop(text, strings)
    for piece in pieces:
        given_out += stop.push(piece)
        assert expected.startswith(given_out)
    assert given_out + stop.flush() == expected
    assert stop.found == any(string in text for string in strings)


@given(pieces=st.lists(st.text("ab", max_size=3), max_size=8), strings=st.lists(st.text("ab", min_size=1), max_size=3))
def test_only_the_beginning_of_a_stop_string_is_held_back(pieces: list[str], strings: list[str]) -> None:
    stop, seen, given_out = StopStrings(strings), "", ""
    for piece in pieces:
        seen += piece
        given_out += stop.push(piece)
        if stop.found:
            break
        held = seen.removeprefix(given_out)
        assert held == "" or any(string.startswith(held) for string in strings)


@pytest.mark.parametrize(
    ("strings", "text", "expected"),
    [
        (["b", "aba"], "aba", "a"),  # the first to be complete, not the first to start
        (["b", "ab"], "aab", "a"),  # complete at the same character: the longest
        (["ab", "b"], "aab", "a"),
        (["aba", "ba"], "ababa", ""),
        (["bc", "abcd"], "abcd", "a"),
        (["abcd"], "xabc", "xabc"),  # never complete
    ],
)
def test_which_of_several_ends_the_text(strings: list[str], text: str, expected: str) -> None:
    for pieces in ([text], list(text), [text[:2], text[2:]]):
        stop = StopStrings(strings)
        assert "".join(map(stop.push, pieces)) + stop.flush() == expected


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stop = StopStrings(["END.", "\n\n"])
    assert stop.push("the E") == "the "
    assert stop.push("N") == ""
    assert stop.push("x\n") == "ENx"
    assert stop.push("y\nEND") == "\ny\n"
    assert stop.push(". more") == ""
    assert stop.found
    assert stop.push("more") == stop.flush() == ""


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings([]).push("abc") == "abc"


def test_one_string_is_not_its_letters() -> None:
    assert StopStrings("END").push("NOTED. ") == "NOTED. "


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopStrings(["a", ""])
