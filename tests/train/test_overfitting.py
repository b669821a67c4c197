"""A run that memorizes says so, and its best checkpoint is kept and found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import TrainTiny

from resmol.__main__ import run as command_line
from resmol.audit.audit import audit
from resmol.checks import all_passed
from resmol.data.shards import Dataset
from resmol.errors import DataError
from resmol.interop.load import load_model
from resmol.interop.model_ref import ModelRef
from resmol.run.checkpoint_manifest import list_checkpoints
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, read_ledger
from resmol.train import loop
from resmol.train.evaluate import Evaluation

LOSSES = (5.0, 3.0, 4.0, 4.1, 4.2, 2.0)
OFTEN = ("evaluation.every=2", "checkpoint.every=2", "checkpoint.keep_last=2")


def records_of(run: Path, kind: str) -> list[Record]:
    return [record for record in read_ledger(RunDir(run).ledger).records if record["kind"] == kind]


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in list_checkpoints(RunDir(run).checkpoints))


@pytest.fixture
def turning(monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """Held-out losses as they are read off here, one for each evaluation."""
    losses = iter(LOSSES)
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: Evaluation(next(losses), 100, 300))
    return losses


def test_the_best_checkpoint_is_kept_and_found(turning: Iterator[float], tmp_path: Path, train_tiny: TrainTiny) -> None:
    run = tmp_path / "run"
    train_tiny(run, 10, *OFTEN)
    assert steps_of(run) == [4, 8, 10], "the best, and the last two"
    assert [record["best"] for record in records_of(run, "save")] == [{"last": 2}, *[{"last": 4}] * 4]
    assert load_model(ModelRef(run, best=True)).source.step == 4
    assert load_model(run).source.step == 10
    warned = [r for r in records_of(run, "warn") if "held-out" in r["what"]]
    assert [(r["step"], r["lowest"], r["now"]) for r in warned] == [(10, 3.0, 4.2)]
    assert "that of step 4" in warned[0]["what"]
    assert all_passed(audit(RunDir(run)))

    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "step-00000004")
    assert [c.name for c in audit(RunDir(tmp_path / "copy")) if not c.passed] == ["checkpoints kept"]

    train_tiny(run, 12, *OFTEN)
    assert steps_of(run) == [10, 12], "a better one takes its place"
    assert load_model(ModelRef(run, best=True)).source.step == 12


def test_best_needs_an_evaluation(tmp_path: Path, train_tiny: TrainTiny, capsys: pytest.CaptureFixture[str]) -> None:
    train_tiny(tmp_path / "run", 2, "evaluation.every=0")
    with pytest.raises(DataError, match="no checkpoint after whose step a held-out loss"):
        load_model(ModelRef(tmp_path / "run", best=True))
    assert command_line(["evaluate", str(tmp_path / "run"), "--best"], debug=False) == 3
    assert "evaluation.every is above 0" in capsys.readouterr().err


def test_a_best_checkpoint_that_is_damaged_is_no_reason_to_take_another(
    turning: Iterator[float], tmp_path: Path, train_tiny: TrainTiny
) -> None:
    run = tmp_path / "run"
    train_tiny(run, 10, *OFTEN)
    (run / "checkpoints" / "step-00000004" / "model.safetensors").write_bytes(b"")
    assert command_line(["inspect", str(run), "--best"], debug=False) != 0
    assert command_line(["generate", str(run), "--best", "--prompt", "ka"], debug=False) == 65


def test_text_that_is_read_too_often(
    tmp_path: Path, train_tiny: TrainTiny, short_dataset: Dataset, messages: list[str]
) -> None:
    run, options = tmp_path / "run", {"data": str(short_dataset.root)}
    windows = -(-(len(short_dataset.train) - 1) // 16)
    passes = next(step for step in range(1, 1000) if 4 * step > 4 * windows)  # 4 windows a step, 4 epochs
    train_tiny(run, passes - 1, **options)
    assert not any("times; beyond 4" in line for line in messages)
    assert not any("was read 4 times" in r["what"] for r in records_of(run, "warn"))
    train_tiny(run, passes + 2, **options)
    assert sum("times; beyond 4" in line for line in messages) == 1
    assert [r["step"] for r in records_of(run, "warn") if "was read 4 times" in r["what"]] == [passes]
    train_tiny(run, passes + 3, **options)
    assert sum("times; beyond 4" in line for line in messages) == 1, "it was said when it was still to come"


def test_the_command_names_what_was_evaluated(
    turning: Iterator[float], tmp_path: Path, train_tiny: TrainTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tiny(tmp_path / "run", 10, *OFTEN)
    assert command_line(["evaluate", str(tmp_path / "run"), "--best", "--windows", "2", "--json"], debug=False) == 0
    found = json.loads(capsys.readouterr().out)["model"]
    assert (found["step"], found["weights"]) == (4, "last")
    assert any("held-out loss is the lowest" in note for note in found["notes"])
    assert command_line(["evaluate", str(tmp_path / "run"), "--weights", "best"], debug=False) == 2
    assert "choose from: last, averaged" in capsys.readouterr().err
