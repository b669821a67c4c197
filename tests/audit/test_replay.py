"""A replay meets the recorded bits, finds what was made up, and does not fail what it cannot judge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import TrainTiny, rewrite

from resmol.audit import segment as module
from resmol.audit.audit import audit
from resmol.audit.certificate import current_certificate, write_certificate
from resmol.audit.replay import ReplayOptions
from resmol.audit.report import write_report
from resmol.audit.segment import Segment, segments
from resmol.checks import Check, all_passed
from resmol.errors import CheckFailed
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, read_ledger

ALL = ReplayOptions(count=100, limit=100, seed=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replayed") / "run"


@pytest.fixture
def run(finished: Path, train_tiny: TrainTiny, tmp_path: Path) -> RunDir:
    """A copy of a run of 25 steps, resumed once; checkpoints at 5, 10, 15, 20, 23, 25."""
    if not finished.exists():
        for steps in (23, 25):
            train_tiny(finished, steps)
    shutil.copytree(finished, tmp_path / "run")
    return RunDir(tmp_path / "run")


def replayed(run: RunDir, options: ReplayOptions = ALL) -> list[Check]:
    return [check for check in audit(run, replay_options=options) if check.name.startswith("replay")]


def test_every_segment_of_an_honest_run_is_met(run: RunDir) -> None:
    checks = replayed(run)
    assert all_passed(checks), checks
    assert [check.name for check in checks[:-1]] == [
        f"replay of steps {a + 1} to {b}" for a, b in [(0, 5), (5, 10), (10, 15), (15, 20), (20, 23), (23, 25)]
    ]
    assert all("tensors of step-" in check.measured for check in checks[:-1])
    assert "25 of 25 steps" in checks[-1].measured
    assert "all of them were replayed" in checks[-1].measured


def test_segments_are_what_the_checkpoints_allow(run: RunDir) -> None:
    shutil.rmtree(run.checkpoints / "step-00000010")
    records = read_ledger(run.ledger).records
    assert segments(run, records, 100)[1] == Segment(5, 15)
    assert segments(run, records, 3)[1] == Segment(5, 8)


def test_the_draw_is_the_auditors(run: RunDir) -> None:
    drawn = {tuple(check.name for check in replayed(run, ReplayOptions(2, 2, seed))) for seed in range(4)}
    assert len(drawn) > 1
    assert all(len(names) == 3 for names in drawn)


def test_the_bound_is_the_closed_form(run: RunDir) -> None:
    """Two of six: with a share f wrong, both are right with (1 - f)^2, which is 5 % at f = 1 - 0.05^(1/2) = 0.78."""
    assert "if over 78 % of those were wrong" in replayed(run, ReplayOptions(2, 2, 0))[-1].measured


@pytest.mark.parametrize("field", ["loss_bits", "grad_norm_bits"])
def test_a_number_that_was_made_up_is_found(run: RunDir, field: str) -> None:
    """The chain is sound and every other check passes: only executing the step again can tell."""

    def forge(records: list[Record]) -> list[Record]:
        twelfth = next(record for record in records if record["kind"] == "step" and record["step"] == 12)
        twelfth[field] = f"{int(twelfth[field], 16) ^ 1:08x}"
        return records

    rewrite(run, forge)
    failed = [check for check in replayed(run) if not check.passed]
    assert [check.name for check in failed] == ["replay of steps 11 to 15"]
    assert f"FAIL at step 12: {field} is" in failed[0].measured


def test_weights_that_were_not_trained_so_are_found(run: RunDir, train_tiny: TrainTiny, tmp_path: Path) -> None:
    """Another run's checkpoint, whole in itself, under this one's name: the next segment begins somewhere else."""
    train_tiny(tmp_path / "other", 15, "train.seed=9")
    shutil.rmtree(run.checkpoints / "step-00000015")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-00000015", run.checkpoints / "step-00000015")
    failed = {check.name for check in replayed(run) if not check.passed}
    assert failed == {"replay of steps 11 to 15", "replay of steps 16 to 20"}


def test_another_machine_is_no_failure_unless_strict(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_differences", lambda *_: "processor A -> B")
    checks = replayed(run, ReplayOptions(2))
    assert all(check.passed for check in checks)
    assert checks[0].measured.startswith("UNSUPPORTED: another machine or library: processor A -> B")
    assert not any(check.passed for check in replayed(run, ReplayOptions(2, strict=True)))


def test_without_the_tokens_nothing_is_claimed(run: RunDir) -> None:
    text = run.config.read_text(encoding="utf-8").splitlines()
    text = ['path = "nowhere"' if line.startswith("path = ") else line for line in text]
    run.config.write_text("\n".join(text), encoding="utf-8")
    assert replayed(run)[0].measured.startswith("UNSUPPORTED: the tokens are not here")


def test_a_certificate_says_what_was_seen_and_expires_with_the_next_line(run: RunDir, train_tiny: TrainTiny) -> None:
    write_certificate(run, audit(run, strict=True, replay_options=ALL))
    content: dict[str, Any] = json.loads(run.certificate.read_text(encoding="utf-8"))
    assert content["ledger"]["head"] == read_ledger(run.ledger).head
    assert (content["steps"], content["survived"]["restarts"]) == (25, 1)
    assert any("replay of steps 1 to 5" in check["name"] for check in content["checks"])
    assert content["limits"]
    assert "Certificate" in write_report(run).read_text(encoding="utf-8")
    train_tiny(run.path, 26)
    assert current_certificate(run) is None
    assert "Certificate" not in write_report(run).read_text(encoding="utf-8")


def test_a_failed_audit_is_not_certified(run: RunDir) -> None:
    shutil.rmtree(run.checkpoints / "step-00000025")
    (run.checkpoints / "step-00000020" / "state.json").write_text("{}")
    with pytest.raises(CheckFailed, match="nothing to certify"):
        write_certificate(run, audit(run))
    assert not run.certificate.exists()


def test_a_strict_audit_does_not_let_a_torn_end_pass(run: RunDir) -> None:
    run.ledger.write_bytes(run.ledger.read_bytes() + b'{"seq":')
    assert audit(run)[0].passed
    assert not audit(run, strict=True)[0].passed
