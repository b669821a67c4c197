"""An option that takes one value and is given twice: an error in every command, before anything is done."""

from __future__ import annotations

import pytest

from resmol.__main__ import run


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["train", "r", "--data", "a.txt", "--data", "b.txt"], "--data"),
        (["train", "r", "--preset", "nano", "--preset=nano"], "--preset"),
        (["generate", "r", "--prompt", "A", "--prompt", "B"], "--prompt"),
        (["prepare", "o", "--input", "a", "--val-fraction", "0.1", "--val-fraction", "0.2"], "--val-fraction"),
        (["evaluate", "r", "--data", "a", "--json", "--data", "b"], "--data"),
        (["bench", "train", "--steps", "1", "--steps", "2"], "--steps"),
    ],
)
def test_what_takes_one_value_is_given_once(
    arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments, debug=False) == 2
    assert f"{name} is given 2 times, and takes one value" in capsys.readouterr().err


def test_lists_and_flags_may_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    run(["train", "/nonexistent/r", "--set", "a=1", "--set", "b=2", "--strict", "--strict"], debug=False)
    assert "2 times" not in capsys.readouterr().err
