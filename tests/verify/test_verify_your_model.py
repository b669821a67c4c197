"""docs/verify-your-model.md: its outputs are what the commands print for the example and its three mistakes.

`PYTHONPATH=src python tests/verify/test_verify_your_model.py` writes the outputs into the page again.
"""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from resmol.__main__ import run

ROOT = Path(__file__).resolve().parents[2]
PAGE, EXAMPLE = ROOT / "docs" / "verify-your-model.md", ROOT / "examples" / "my_smollm2.py"
COMMAND = "$ resmol verify --preset nano --model examples/my_smollm2.py:SmolLM2"
CONSOLE = re.compile(r"```console\n(.*?)```", re.DOTALL)
DIFF = re.compile(r"```diff\n(.*?)```", re.DOTALL)
# Rounding differs between processors, and with it the place of the largest error.
UNSTABLE = re.compile(r" in model\.\S+|\d[\d.,]*(e[-+]\d+)?")


def with_mistake(diff: str) -> str:
    """Return the example with the lines of a diff replaced."""
    removed, added = ("\n".join(line[1:] for line in diff.splitlines() if line.startswith(mark)) for mark in ("-", "+"))
    code = EXAMPLE.read_text(encoding="utf-8")
    assert code.count(removed) == 1, removed
    return code.replace(removed, added)


def printed(code: str, folder: Path) -> list[str]:
    """Return the lines of the table and the verdict for a module."""
    file = folder / EXAMPLE.name
    file.write_text(code, encoding="utf-8")
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        run(["verify", "--preset", "nano", "--model", f"{file}:SmolLM2"], debug=False)
    ends = [line for line in err.getvalue().splitlines() if line.startswith(("error:", "  fix:"))]
    return [line.rstrip() for line in out.getvalue().splitlines()[1:]] + ends


def without_passes(lines: list[str]) -> list[str]:
    """Keep the first lines of the rows that fail, the count and the verdict."""
    return [
        line for line in lines if line.startswith((" FAIL", "error:", "  fix:")) or re.match(r" +\d+ of \d+ pass", line)
    ]


def outputs(folder: Path) -> list[list[str]]:
    """Return what the page shows, from the commands."""
    diffs = DIFF.findall(PAGE.read_text(encoding="utf-8"))
    right = [COMMAND, *printed(EXAMPLE.read_text(encoding="utf-8"), folder)]
    return [right, *([COMMAND, *without_passes(printed(with_mistake(diff), folder))] for diff in diffs)]


@pytest.mark.usefixtures("computed_once")
def test_the_page_shows_what_the_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shown = [block.splitlines() for block in CONSOLE.findall(PAGE.read_text(encoding="utf-8"))]
    for block, found in zip(shown, outputs(tmp_path), strict=True):
        assert [UNSTABLE.sub("#", line) for line in block] == [UNSTABLE.sub("#", line) for line in found]


def test_a_map_of_names_is_written_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "names.json"
    command = ["verify", "--preset", "nano", "--write-names", str(file)]
    assert run(command, debug=False) == 2  # of which module?
    assert "name the implementation: --model FILE:CLASS" in capsys.readouterr().err
    assert run([*command, "--model", f"{EXAMPLE}:SmolLM2"], debug=False) == 0
    assert "12 of 12 names are recognized" in capsys.readouterr().out
    assert '"embed_tokens.weight": "model.embed_tokens.weight"' in file.read_text(encoding="utf-8")


if __name__ == "__main__":
    os.environ["COLUMNS"] = "120"
    with TemporaryDirectory() as temporary:
        blocks = iter(outputs(Path(temporary)))
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(CONSOLE.sub(lambda _: "```console\n" + "\n".join(next(blocks)) + "\n```", text), encoding="utf-8")
