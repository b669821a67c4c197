"""Two runs that should be equal: what differs first is named, and the one that an execution gives is right."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny import TrainTiny, change_weight, rewrite

from resmol.__main__ import run as resmol
from resmol.audit.compare import compare_runs
from resmol.checks import Check
from resmol.run.directory import RunDir
from resmol.run.ledger import Record


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared") / "run"


@pytest.fixture
def pair(finished: Path, train_tiny: TrainTiny, tmp_path: Path) -> tuple[Path, Path]:
    """Two copies of a run of 12 steps with checkpoints at 5, 10 and 12."""
    if not finished.exists():
        train_tiny(finished, 12)
    for name in "ab":
        shutil.copytree(finished, tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def found(a: Path, b: Path) -> dict[str, Check]:
    return {check.name.partition(":")[0]: check for check in compare_runs(a, b)}


def forge(run: Path, step: int, field: str = "loss_bits") -> None:
    """Change a bit of a step, and every hash that covers it."""

    def change(records: list[Record]) -> list[Record]:
        (record,) = (one for one in records if one["kind"] == "step" and one["step"] == step)
        record[field] = f"{int(record[field], 16) ^ 1:08x}"
        return records

    rewrite(RunDir(run), change)


def test_seconds_sessions_and_places_are_no_difference(
    pair: tuple[Path, Path], train_tiny: TrainTiny, tmp_path: Path
) -> None:
    for steps in (7, 14):
        train_tiny(tmp_path / "own", steps)
    checks = found(pair[0], tmp_path / "own")
    assert all(check.passed for check in checks.values()), checks
    assert checks["steps"].measured == "12 steps with the same bits; B has 2 steps more"
    assert list(checks) == ["A", "B", "configuration", "data", "environment", "steps"]
    assert resmol(["audit", str(pair[0]), "--against", str(tmp_path / "own")], debug=True) == 0


@pytest.mark.parametrize("forged", ["A", "B"])
def test_one_changed_bit_and_who_is_right(pair: tuple[Path, Path], forged: str) -> None:
    other = {"A": "B", "B": "A"}[forged]
    forge(pair["AB".index(forged)], 8, "grad_norm_bits")
    checks = found(*pair)
    assert [name for name, check in checks.items() if not check.passed] == ["steps"]
    assert checks["steps"].measured.startswith("step 8: grad_norm_bits is ")
    assert checks["who is right"].measured.startswith(
        f"{other} is right, by executing steps 6 to 8 again; {forged}: FAIL"
    )
    assert resmol(["audit", str(pair[0]), "--against", str(pair[1])], debug=False) == 1


def test_neither_is_right(pair: tuple[Path, Path]) -> None:
    """Both begin with the same lie, and differ later: the segment before the difference holds it."""
    for run, step in ((pair[0], 7), (pair[1], 7), (pair[1], 8)):
        forge(run, step)
    checks = found(*pair)
    assert checks["steps"].measured.startswith("step 8: loss_bits")
    assert checks["who is right"].measured.startswith(
        "neither is right, by executing steps 6 to 8 again; A: FAIL at step 7"
    )
    assert not checks["who is right"].passed


def test_a_difference_that_settings_explain(pair: tuple[Path, Path], train_tiny: TrainTiny) -> None:
    """A copy that goes on with another learning rate shares its first lines with the original."""
    train_tiny(pair[0], 16)
    train_tiny(pair[1], 16, "optimizer.lr=0.02", accept_drift=["optimizer.lr"])
    checks = found(*pair)
    assert checks["configuration"].measured == "at step 13: optimizer.lr is 0.01 in A and 0.02 in B"
    assert checks["steps"].measured.startswith("step 13: lr is ")
    assert checks["who is right"].measured.startswith("both are what their own settings")
    assert "executing step 13 again" in checks["who is right"].measured


def test_weights_that_no_step_explains(pair: tuple[Path, Path]) -> None:
    """Every step is the same, and so is every hash of the forged run; the checkpoints are not."""
    change_weight(RunDir(pair[1]), 12)
    checks = found(*pair)
    assert checks["B"].passed
    assert checks["steps"].measured.startswith("step 12: model.safetensors/model.norm.weight is ")
    assert checks["who is right"].measured.startswith("A is right, by executing steps 11 to 12 again")


def test_a_record_that_does_not_hold_together_says_nothing(pair: tuple[Path, Path]) -> None:
    ledger = pair[1] / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'"step":7', b'"step":6', 1))
    checks = found(*pair)
    assert [(name, check.passed) for name, check in checks.items()] == [("A", True), ("B", False)]
    assert "hash chain: " in checks["B"].measured
