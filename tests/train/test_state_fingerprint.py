"""What went wrong with the weights is found at its step: mutants of a training, each recorded, then replayed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TrainTiny

from resmol.audit.audit import audit
from resmol.audit.replay import ReplayOptions
from resmol.errors import CheckFailed
from resmol.run.checkpoint_manifest import Manifest, file_entry, open_checkpoint
from resmol.run.directory import RunDir
from resmol.train import step

EACH_STEP = "train.fingerprint_steps=1"


def faulty(kind: str, genuine: Any, at: int) -> Any:
    """Return an update that goes wrong once."""
    count = 0

    def update(optimizer: torch.optim.Optimizer, **how: Any) -> None:
        nonlocal count
        count += 1
        if count == at and kind == "a skipped update":
            optimizer.zero_grad()
            return
        genuine(optimizer, **how)
        parameter = optimizer.param_groups[0]["params"][3]
        target = parameter.data if kind == "a changed weight" else optimizer.state[parameter]["exp_avg_sq"]
        if count == at:
            target.view(-1).view(torch.int32)[5] ^= 1

    return update


@pytest.mark.parametrize("kind", ["a skipped update", "a changed weight", "a changed moment"])
def test_what_went_wrong_is_found_at_its_step(
    tmp_path: Path, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(step, "apply_update", faulty(kind, step.apply_update, at=7))
        train_tiny(tmp_path / "run", 10, EACH_STEP)
    options = ReplayOptions(9)
    failed = [check.measured for check in audit(RunDir(tmp_path / "run"), replay_options=options) if not check.passed]
    assert len(failed) == 1
    assert failed[0].startswith("FAIL at step 7: fingerprint is 1:")


def test_a_swapped_checkpoint_is_found_by_a_resume_and_by_an_audit(tmp_path: Path, train_tiny: TrainTiny) -> None:
    """It is whole, it names this run's head, configuration and data, and a crash kept its own record away."""
    run = tmp_path / "run"
    train_tiny(run, 10, EACH_STEP)
    train_tiny(tmp_path / "other", 10, "train.seed=9")
    ours, theirs = (path / "checkpoints" / "step-00000010" for path in (run, tmp_path / "other"))
    state = open_checkpoint(ours).state.model_copy(update={"fingerprint": open_checkpoint(theirs).state.fingerprint})
    manifest = open_checkpoint(theirs).manifest
    shutil.copytree(theirs, ours, dirs_exist_ok=True)
    (ours / "state.json").write_bytes(state.to_bytes())
    entries = manifest.files | {"state.json": file_entry(ours / "state.json", {})}
    changed = {
        **manifest.model_dump(),
        "parent": open_checkpoint(run / "checkpoints" / "step-00000005").manifest.sha256,
    }
    (ours / "manifest.json").write_bytes(Manifest.model_validate({**changed, "files": entries}).to_bytes())
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    saved = max(number for number, line in enumerate(lines) if b'"kind":"save"' in line)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:saved]))

    failed = [check for check in audit(RunDir(run)) if not check.passed]
    assert [check.name for check in failed] == ["checkpoint step-00000010"]
    assert "not those that step 10 recorded" in failed[0].measured
    with pytest.raises(CheckFailed, match="does not hold the weights and moments that step 10 recorded"):
        train_tiny(run, 12, EACH_STEP)
    ours.rename(tmp_path / "moved")
    assert train_tiny(run, 12, EACH_STEP).step == 12, "as the message says, it goes on from the one before"
