"""A mirror brings a run back on another machine, bit for bit, and never stops or spoils the run that it copies."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, hub_with_client
from test_resume import assert_equal_runs
from tiny import TrainTiny

from resmol.audit.audit import audit
from resmol.checks import all_passed
from resmol.errors import CheckpointError, DataError, ResmolError, RunInUse, UsageError
from resmol.run import mirror as mirror_module
from resmol.run import mirror_places
from resmol.run.checkpoint_manifest import list_checkpoints
from resmol.run.directory import RunDir
from resmol.run.ledger import read_ledger, select

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the Hub's client
SAVE = ("checkpoint.every=2", "averaging.fraction=0.5")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with hub_with_client(tmp_path, monkeypatch) as server:
        yield server


def warned(run: Path) -> list[str]:
    return [record["reason"] for record in select(read_ledger(run / "ledger.jsonl").records, "warn")]


@pytest.mark.parametrize("kind", ["folder", "hub"])
def test_a_machine_that_vanishes(tmp_path: Path, train_tiny: TrainTiny, hub: Hub, kind: str) -> None:
    """Nothing is left but the mirror. The machine comes back, and is refused: another one has gone on."""
    mirror = str(tmp_path / "mirror") if kind == "folder" else "hf://alice/run"
    run = tmp_path / "run"
    train_tiny(tmp_path / "straight", 12, *SAVE)
    train_tiny(run, 7, *SAVE, "checkpoint.permanent=[2]", mirror=mirror)
    run.rename(tmp_path / "other")
    train_tiny(run, 12, *SAVE, mirror=mirror)
    assert_equal_runs(run, tmp_path / "straight", 12)
    assert all_passed(audit(RunDir(run), strict=True))
    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert mirror_names(mirror, hub) >= set(names), "and one that retention has not removed yet, perhaps"
    assert "step-00000002" in names, "which is permanent"
    with pytest.raises(RunInUse, match="another machine has gone on with this run"):
        train_tiny(tmp_path / "other", 12, *SAVE, mirror=mirror)
    assert train_tiny(tmp_path / "other", 12, *SAVE).step == 12
    assert not warned(run)


def mirror_names(mirror: str, hub: Hub) -> set[str]:
    if not mirror.startswith("hf://"):
        return {path.name for path in (Path(mirror) / "checkpoints").iterdir()}
    repo = hub.repos["models/alice/run"]
    assert repo.private
    return {name.split("/")[1] for name in repo.files if name.startswith("checkpoints/")}


def test_another_machine_that_copies_first(tmp_path: Path, train_tiny: TrainTiny) -> None:
    """The first one finds out at its next save and stops; its own state is saved."""
    mirror = str(tmp_path / "mirror")
    train_tiny(tmp_path / "a", 4, *SAVE, mirror=mirror)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    train_tiny(tmp_path / "b", 6, *SAVE, mirror=mirror)
    train_tiny(tmp_path / "a", 6, *SAVE)
    with pytest.raises(RunInUse):
        train_tiny(tmp_path / "a", 8, *SAVE, mirror=mirror)
    train_tiny(tmp_path / "c", 2, *SAVE)
    with pytest.raises(UsageError, match="holds another run"):
        train_tiny(tmp_path / "c", 4, *SAVE, mirror=mirror)


@pytest.mark.parametrize("fault", ["full", "gone", "hangs", "damaged"])
def test_a_mirror_that_fails_does_not_stop_training(
    fault: str, tmp_path: Path, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive, run = tmp_path / "drive", tmp_path / "run"
    drive.mkdir()
    mirror = drive / "mirror"
    train_tiny(run, 4, *SAVE, mirror=str(mirror))
    answers = threading.Event()
    with monkeypatch.context() as patch:
        if fault == "full":
            patch.setattr(mirror_places.shutil, "copyfile", out_of_space)
        elif fault == "hangs":
            patch.setattr(mirror_module, "PATIENCE_SECONDS", 0.2)
            patch.setattr(mirror_places.shutil, "copyfile", lambda *_: answers.wait(60))
        elif fault == "gone":
            shutil.rmtree(drive)
        else:
            (mirror / "ledger.jsonl").write_bytes(b"rubbish\n")
        assert train_tiny(run, 8, *SAVE, mirror=str(mirror)).step == 8
    answers.set()
    assert warned(run)
    if fault == "damaged":
        shutil.rmtree(mirror)
    drive.mkdir(exist_ok=True)
    assert train_tiny(run, 10, *SAVE, mirror=str(mirror)).step == 10
    shutil.rmtree(run)
    train_tiny(tmp_path / "straight", 12, *SAVE)
    train_tiny(run, 12, *SAVE, mirror=str(mirror))
    assert_equal_runs(run, tmp_path / "straight", 12)


def out_of_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_what_cannot_be_copied_back(tmp_path: Path, train_tiny: TrainTiny) -> None:
    """A damaged checkpoint is left out, and the one before is taken; without any, or a drive, nothing starts."""
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    train_tiny(run, 6, *SAVE, mirror=str(mirror))
    shutil.rmtree(run)
    newest, before = list_checkpoints(mirror / "checkpoints")[:2]
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    train_tiny(run, 6, *SAVE, mirror=str(mirror))
    (resumed,) = select(read_ledger(run / "ledger.jsonl").records, "resume")
    assert resumed["checkpoint"] == before.name
    for path in list_checkpoints(mirror / "checkpoints"):
        (path / "manifest.json").unlink()
    shutil.rmtree(run)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        train_tiny(run, 6, *SAVE, mirror=str(mirror))
    with pytest.raises(DataError, match="cannot be reached"):
        train_tiny(tmp_path / "new", 6, *SAVE, mirror=str(tmp_path / "not-mounted" / "mirror"))
    with pytest.raises(ResmolError, match="--mirror"):
        train_tiny(tmp_path / "new", 6, *SAVE, mirror="hf://alice")
