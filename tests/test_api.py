"""The Python interface as it is met in a notebook: names that complete, the commands as functions, short values."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import TrainTiny, synthetic_texts

import resmol
from resmol.__main__ import run as command_line
from resmol.checks import Check, Checks
from resmol.config.run_config import RunConfig
from resmol.data.tokenizer import Tokenizer


def test_names_complete_and_exist() -> None:
    assert dir(resmol) == sorted(resmol.__all__)
    assert all(getattr(resmol, name) is not None for name in resmol.__all__)


def test_every_function_says_what_it_takes() -> None:
    functions = [getattr(resmol, name) for name in resmol.__all__ if inspect.isfunction(getattr(resmol, name))]
    assert len(functions) >= 9
    for function in functions:
        text = inspect.getdoc(function) or ""
        for name in inspect.signature(function).parameters:
            if name != "overrides" and len(inspect.signature(function).parameters) > 2:
                assert f"{name}: " in text, f"{function.__name__}({name})"


def test_values_are_shown_in_a_line(tmp_path: Path, train_tiny: TrainTiny) -> None:
    state = train_tiny(tmp_path / "run", 2, "sampling.every=0", "evaluation.every=0")
    assert repr(state) == f"TrainState(step=2, tokens_seen={state.tokens_seen}, windows_seen=8)"
    shown = repr(resmol.load_model(tmp_path / "run", device="cpu"))
    assert shown.startswith(f"LoadedModel(checkpoint {tmp_path / 'run'}")
    assert shown.endswith(" parameters)")


def test_checks_are_a_line_in_python_and_a_table_in_a_notebook() -> None:
    good, bad = Check("a<b", True, "1", "1"), Check("sum", False, "3", "4")
    assert repr(Checks([good])) == "1 of 1 checks passed"
    both = Checks([good, bad])
    assert repr(both) == "1 of 2 checks passed\n  FAIL sum: 3 (expected: 4)"
    assert (both.passed, Checks([good]).passed, Checks().passed) == (False, True, False)
    table = both._repr_html_()
    assert table.count("<tr>") == 3
    assert "a&lt;b" in table
    assert "<b>FAIL</b>" in table


@pytest.mark.usefixtures("as_a_library")
def test_the_commands_as_functions(
    tmp_path: Path,
    tiny_config: RunConfig,
    tiny_tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From text to a report, with nothing printed, and with the results that the command line prints."""
    text, run = tmp_path / "input.txt", tmp_path / "run"
    text.write_text("\n".join(synthetic_texts(100)), encoding="utf-8")
    data = resmol.prepare_data(tmp_path / "data", text, tokenizer=tiny_tokenizer.path, val_fraction=0.2)
    assert len(data.val) > 0
    assert len(repr(data)) < 200
    config = tiny_config.replace({"train.steps": 10})
    resmol.train_model(config, run, data=str(data.root), tokenizer=tiny_tokenizer.path)
    checks = resmol.audit_run(run, replay=1, seed=3)
    assert checks.passed
    assert resmol.report_run(run) == run / "report.html"
    assert resmol.report_run(run, plot=tmp_path / "loss.svg").is_file()
    evaluation = resmol.evaluate_model(run)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    for arguments, expected in (
        (["audit", str(run), "--replay", "1", "--seed", "3"], [check.name for check in checks]),
        (["evaluate", str(run)], evaluation["loss"]),
    ):
        assert command_line([*arguments, "--json"], debug=True) == 0
        found = json.loads(capsys.readouterr().out)
        assert expected == ([check["name"] for check in found["checks"]] if "checks" in found else found["loss"])


@pytest.mark.parametrize("options", [{"space": True, "format": "gguf"}, {"model_repo": "a/b"}])
def test_what_cannot_be_exported(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(resmol.ResmolError, match="Space"):
        resmol.export_model(tmp_path, tmp_path / "out", **options)


def test_a_configuration_is_shown_in_a_line() -> None:
    shown = repr(resmol.load_preset("nano"))
    assert shown == "RunConfig(nano: 4 layers of width 48, 128 tokens a step, 5,000 steps)"
    assert shown == str(resmol.load_preset("nano"))


def test_the_demo_needs_no_import_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import resmol; print(resmol.demo.serve.__name__)"], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout == "serve\n"
