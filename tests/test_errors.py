"""The exception tree: what its module's docstring draws is what the classes are."""

from __future__ import annotations

import inspect
import re
import textwrap
import traceback

import pytest

from resmol import errors
from resmol.errors import CheckFailed, Interrupted, ResmolError

DRAWN = re.compile(r"^(?P<indent>[ │├└─]*)(?P<name>[A-Z]\w+)\s+(?P<code>\d+)?", re.MULTILINE)


def drawn_tree() -> dict[str, tuple[str, int | None]]:
    """Return class -> (parent, exit code) as the docstring draws it."""
    tree: dict[str, tuple[str, int | None]] = {}
    branch: list[str] = []
    drawing = textwrap.dedent((errors.__doc__ or "").partition("\n\n")[2])
    for match in DRAWN.finditer(drawing):
        depth = len(match["indent"]) // 4
        branch[depth:] = [match["name"]]
        parent = branch[depth - 1] if depth else "Exception"
        tree[match["name"]] = (parent, int(match["code"]) if match["code"] else None)
    return tree


def classes() -> dict[str, type[ResmolError]]:
    members = vars(errors).values()
    return {cls.__name__: cls for cls in members if inspect.isclass(cls) and issubclass(cls, ResmolError)}


def test_the_docstring_draws_every_class_with_its_parent() -> None:
    assert {name: parent for name, (parent, _) in drawn_tree().items()} == {
        name: cls.__base__.__name__ for name, cls in classes().items() if cls.__base__ is not None
    }


def test_the_docstring_states_every_exit_code() -> None:
    by_signal = {"Interrupted"}  # 128 + the signal's number, decided where the process ends
    drawn = {name: code for name, (_, code) in drawn_tree().items() if code is not None and name not in by_signal}
    assert drawn == {name: classes()[name].exit_code for name in drawn}
    assert set(classes()) - set(drawn) == {"ResmolError", *by_signal}


@pytest.mark.parametrize("name", sorted(classes()))
def test_every_error_says_what_and_what_to_do(name: str) -> None:
    extra = {"signal_number": 15} if name == "Interrupted" else {}
    error = classes()[name]("the disk is full", fix="free some space", **extra)
    assert (str(error), error.what, error.fix) == ("the disk is full", "the disk is full", "free some space")


def test_a_traceback_shows_what_to_do() -> None:
    error = CheckFailed("the disk is full", fix="free some space")
    assert "fix: free some space" in "".join(traceback.format_exception(error))


def test_an_error_without_a_remedy_cannot_be_made() -> None:
    with pytest.raises(TypeError):
        CheckFailed("something is wrong")  # type: ignore[call-arg]


def test_an_interruption_keeps_its_signal() -> None:
    assert Interrupted("stopped", fix="run it again", signal_number=2).signal_number == 2
