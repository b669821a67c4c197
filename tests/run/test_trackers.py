"""Trackers: one curve for a run however often it is resumed, and never an end of training."""

from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import TrainTiny, step_record

from resmol.config.run_config import RunConfig
from resmol.errors import UsageError
from resmol.run.directory import RunDir
from resmol.run.ledger import read_ledger, select
from resmol.run.trackers import TrackerWriter, WandB, run_id, tracker_writers

TAGS = {"train/loss", "train/lr", "train/grad_norm", "val/loss", "val/bpb", "perf/tokens_per_sec"}


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.opened: list[int] = []
        self.points: list[tuple[str, int]] = []

    def open(self, first_step: int) -> None:
        self.opened.append(first_step)

    def log(self, scalars: dict[str, float], step: int) -> None:
        self.points += [(tag, step) for tag in scalars]

    def close(self) -> None:
        pass


def test_a_resumed_run_goes_on_with_its_curve(tmp_path: Path, train_tiny: TrainTiny) -> None:
    tracker = Recorder()
    for steps in (20, 22):
        train_tiny(tmp_path / "run", steps, log_writers=lambda _: [TrackerWriter("recorder", tracker)])
    assert {tag for tag, _ in tracker.points} == TAGS
    assert [step for tag, step in tracker.points if tag == "train/loss"] == list(range(1, 23))
    assert tracker.opened == [1, 21]


def test_a_crash_takes_back_what_was_not_saved() -> None:
    tracker = Recorder()
    writer = TrackerWriter("recorder", tracker)
    for record in [
        {"kind": "rewind", "from_step": 7, "to_step": 4},
        {"kind": "step", **step_record(5)},
    ]:
        writer.show(record)
    assert tracker.opened == [5]


@pytest.mark.parametrize("broken", ["open", "log", "close"])
def test_a_tracker_that_fails_is_named_once_and_training_ends_well(
    broken: str, tmp_path: Path, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise RuntimeError("api_key not configured (no-tty)\nTraceback: a long story")

    monkeypatch.setattr(Recorder, broken, fail)
    writers = [TrackerWriter("wandb", Recorder())]
    assert train_tiny(tmp_path / "run", 3, log_writers=lambda _: writers).step == 3
    warnings = list(select(read_ledger(tmp_path / "run" / "ledger.jsonl").records, "warn"))
    said = [(record["what"], record["reason"]) for record in warnings]
    assert said == ([] if broken == "close" else [("wandb disabled", "RuntimeError: api_key not configured (no-tty)")])


def test_one_that_is_not_installed(tmp_path: Path, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("resmol.run.trackers.find_spec", lambda _: None)
    config = tiny_config.replace({"logging.wandb": True})
    with pytest.raises(UsageError, match=r"logging\.wandb needs wandb, which is not installed"):
        tracker_writers(RunDir(tmp_path), config)


def test_real_tensorboard_events_are_written(tmp_path: Path, tiny_config: RunConfig) -> None:
    pytest.importorskip("tensorboardX")
    (writer,) = tracker_writers(RunDir(tmp_path), tiny_config.replace({"logging.tensorboard": True}))
    writer.show({"kind": "step", **step_record(1)})
    writer.close()
    assert next((tmp_path / "tensorboard").glob("events.*")).stat().st_size > 100


def test_wandb_finds_the_run_again(tmp_path: Path, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []

    class Module:
        Settings = dict

        @staticmethod
        def init(**arguments: Any) -> Any:
            started.append(arguments)
            return Run()

    class Run:
        def define_metric(self, name: str, *, step_metric: str) -> None:
            assert (name, step_metric) == ("*", "step")

    monkeypatch.setitem(sys.modules, "wandb", Module())
    run = RunDir(tmp_path / "mine")
    run.path.mkdir()
    run.ledger.write_bytes(b"{first}\n{second}\n")
    for first_step in (1, 21):
        WandB(run, tiny_config).open(first_step)
        with run.ledger.open("ab") as ledger:
            ledger.write(b"{more}\n")
    one, two = started
    assert one == two
    assert (one["id"], one["name"], one["resume"], one["project"]) == (run_id(run.ledger), "mine", "allow", "resmol")
    assert one["config"]["optimizer.lr"] == tiny_config.optimizer.lr
    assert not {"data.path", "data.source", "sampling.prompt"} & set(one["config"]), "what stays on this machine"


def losses(run: Path) -> list[tuple[int, float]]:
    """Return what the ledger says: each step and its loss."""
    return [(record["step"], record["loss"]) for record in select(read_ledger(run / "ledger.jsonl").records, "step")]


@pytest.mark.interop
def test_trackio_has_one_curve(tmp_path: Path, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for steps in (3, 5):
        train_tiny(tmp_path / "run", steps, "logging.trackio=true")
    with sqlite3.connect(tmp_path / "trackio" / "resmol.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    recorded = losses(tmp_path / "run")
    points = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert [(step, values["train/loss"]) for step, values in points if "train/loss" in values] == recorded
    assert len({name for name, _, _ in rows}) == 1


@pytest.mark.interop
def test_wandb_offline_has_one_curve(tmp_path: Path, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files of a few steps hold what was logged as plain JSON inside their frames."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (3, 5):
        train_tiny(tmp_path / "run", steps, "logging.wandb=true")
    one, two = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert one.name == two.name == f"run-{run_id(tmp_path / 'run' / 'ledger.jsonl')}.wandb"
    found = [
        [step for step, loss in losses(tmp_path / "run") if repr(loss).encode() in p.read_bytes()] for p in (one, two)
    ]
    assert found == [[1, 2, 3], [4, 5]]
