"""Stop strings: compared with searching the whole text at once, however it is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resmol.errors import UsageError
from resmol.inference.stop_strings import StopStrings

LETTERS = st.text("ab", max_size=12)


@given(pieces=st.lists(st.text("ab", max_size=3), max_size=8), strings=st.lists(st.text("ab", min_size=1), max_size=3))
def test_any_way_of_cutting_it_ends_before_the_first_stop_string(pieces: list[str], strings: list[str]) -> None:
    stop, given_out = StopStrings(strings), ""
    for piece in pieces:
        given_out += stop.push(piece)
        whole_so_far = "".join(pieces)
        places = [whole_so_far.find(string) for string in strings if string in whole_so_far]
        assert whole_so_far[: min(places, default=len(whole_so_far))].startswith(given_out)
    given_out += stop.flush()
    whole = "".join(pieces)
    # The first piece after which a stop string is there decides: what would come later was never seen.
    seen = ""
    for piece in pieces:
        seen += piece
        if any(string in seen for string in strings):
            break
    places = [seen.find(string) for string in strings if string in seen]
    assert given_out == seen[: min(places, default=len(whole))]
    assert stop.found == bool(places)


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
