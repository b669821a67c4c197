"""A run of version 0.1: every command that reads a run says in a sentence which version to use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import TrainTiny, rewrite

from resmol.__main__ import run as command_line
from resmol.run.directory import RunDir
from resmol.run.ledger import Record


def as_version_0_1(run: RunDir) -> None:
    """Change a run to what version 0.1.0 wrote: other keys, other format numbers."""
    text = run.config.read_text(encoding="utf-8")
    text = text.replace('matmul_backend = "mkl"', 'products = "blas"').replace("collective_timeout", "peer_timeout")
    run.config.write_text(text, encoding="utf-8")

    def older(records: list[Record]) -> list[Record]:
        return [{**records[0], "format": 1, "version": "0.1.0"}, *records[1:]]

    rewrite(run, older)
    for path in run.checkpoints.glob("*/manifest.json"):
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "format": 1}), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("old")


@pytest.fixture
def old(folder: Path, train_tiny: TrainTiny) -> RunDir:
    run = RunDir(folder / "run")
    if not run.exists():
        train_tiny(run.path, 5)
        as_version_0_1(run)
    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "RUN"],
        ["train", "RUN", "--preset", "nano", "--allow-fresh"],
        ["audit", "RUN"],
        ["audit", "RUN", "--replay", "1"],
        ["report", "RUN"],
        ["generate", "RUN", "--prompt", "ka"],
        ["evaluate", "RUN"],
        ["inspect", "RUN"],
        ["demo", "RUN"],
        ["export", "RUN", "OUT"],
    ],
    ids=" ".join,
)
def test_a_run_of_version_0_1(
    arguments: list[str], old: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": str(old.path), "OUT": str(tmp_path / "out")}
    before = {path: path.stat().st_mtime_ns for path in old.path.rglob("*")}
    assert command_line([places.get(word, word) for word in arguments], debug=False) == 3
    error = capsys.readouterr().err
    assert f"{old.path} was written by resmol 0.1.0 (format 1); this version reads format 2" in error
    assert "use resmol 0.1.0 for it" in error
    assert not {"Traceback", "unknown key"} & set(error.split("\n"))
    assert "unknown key" not in error
    assert len(error.splitlines()) <= 3
    changed = {path for path in old.path.rglob("*") if before.get(path) != path.stat().st_mtime_ns}
    assert {path.name for path in changed} <= {"lock"}, "nothing is written"


@pytest.mark.parametrize("arguments", [["generate", "CHECKPOINT", "--prompt", "ka"], ["evaluate", "CHECKPOINT"]])
def test_a_checkpoint_of_version_0_1(arguments: list[str], old: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    path = old.checkpoints / "step-00000005"
    assert command_line([str(path) if word == "CHECKPOINT" else word for word in arguments], debug=False) == 65
    assert "step-00000005/manifest.json has format 1; this version of resmol reads 2" in capsys.readouterr().err
