"""A run for a given time is a run with a number of steps: the one that would have been started with that plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_resume import Crash, Hook, assert_equal_runs, die, history
from tiny import step_record

from resmol.__main__ import run as command_line
from resmol.audit.audit import audit
from resmol.audit.replay import ReplayOptions
from resmol.checks import all_passed
from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import UsageError
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, read_ledger, select
from resmol.train import time_budget as module
from resmol.train.start import train_model
from resmol.train.time_budget import describe_duration, parse_duration, step_cost, train_for


@pytest.fixture
def options(tiny_dataset: Dataset, tiny_tokenizer: Tokenizer) -> dict[str, Any]:
    return {"data": str(tiny_dataset.root), "tokenizer": tiny_tokenizer.path}


@pytest.fixture(autouse=True)
def a_second_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands still, and a step counts as a second: 40 seconds are the 20 steps that are measured and 40."""
    monkeypatch.setattr(module.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(module, "step_cost", lambda *_: 1.0)


def changes_of(run: Path) -> list[dict[str, Any]]:
    return [r["changes"] for r in select(read_ledger(RunDir(run).ledger).records, "drift")]


def test_it_is_the_run_that_was_planned_so_from_the_start(
    tiny_config: RunConfig, options: dict[str, Any], tmp_path: Path
) -> None:
    state = train_for(40, tiny_config, tmp_path / "run", **options)
    assert state.step == 60
    horizon = ["train.steps=60", "schedule.decay_start=48", "schedule.decay_steps=12"]
    train_model(tiny_config, tmp_path / "planned", overrides=horizon, **options)
    assert_equal_runs(tmp_path / "run", tmp_path / "planned", 60)
    assert history(tmp_path / "run")[60]["lr"] == 0.0
    assert [sorted(changes) for changes in changes_of(tmp_path / "run")] == [sorted(module.PLANNED)]
    stored = RunDir(tmp_path / "run").load_config()
    assert (stored.schedule.planned_seconds, stored.train.steps) == (40, 60)


def test_the_audit_replays_across_the_plan(tiny_config: RunConfig, options: dict[str, Any], tmp_path: Path) -> None:
    """Retention removes the checkpoint between the measured steps and the others; a schedule is no obstacle."""
    train_for(40, tiny_config, tmp_path / "run", overrides=["checkpoint.every=0"], **options)
    for path in (tmp_path / "run" / "checkpoints" / "step-00000020").iterdir():
        path.unlink()
    (tmp_path / "run" / "checkpoints" / "step-00000020").rmdir()
    checks = audit(RunDir(tmp_path / "run"), replay_options=ReplayOptions(count=9, strict=True))
    kept = [check for check in checks if check.name != "checkpoints kept"]  # it was the best one
    assert all_passed(kept), kept
    assert any(check.name == "replay of steps 1 to 60" for check in kept)


@pytest.mark.parametrize("step", [13, 40], ids=["while it is measured", "after the plan"])
def test_the_same_command_goes_on(step: int, tiny_config: RunConfig, options: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Crash):
        train_for(40, tiny_config, run, log_writers=lambda _: [Hook(step, die)], **options)
    state = train_for(40, tiny_config, run, **options)
    assert state.step == (60 if step == 40 else 13 + 20 + 40), "what was done before the plan is not planned again"
    assert len(changes_of(run)) == 1
    assert all_passed(audit(RunDir(run)))
    assert train_for(40, tiny_config, run, **options).step == state.step, "nothing is left to do"
    assert train_model(None, run, **options).step == state.step


def test_a_decay_of_the_configuration_gives_its_share(
    tiny_config: RunConfig, options: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny_config.replace({"schedule.decay_start": 500, "schedule.decay_steps": 500})
    train_for(40, config, tmp_path / "run", **options)
    schedule = RunDir(tmp_path / "run").load_config().schedule
    assert (schedule.decay_start, schedule.decay_steps) == (30, 30)


@pytest.mark.parametrize(
    ("overrides", "more", "what"),
    [
        (["train.steps=9"], {}, "--steps"),
        (["schedule.decay_start=50", "schedule.decay_steps=5"], {}, "schedule.decay_start, schedule.decay_steps"),
        ([], {"epochs": 1.0}, "--epochs"),
        (["schedule.kind=cosine", "schedule.horizon=50"], {}, "schedule.kind is cosine"),
    ],
)
def test_contradictions_leave_nothing_behind(
    overrides: list[str], more: dict[str, Any], what: str, tiny_config: RunConfig, options: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(UsageError, match=what):
        train_for(40, tiny_config, tmp_path / "run", overrides=overrides, **options, **more)
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_horizon(tiny_config: RunConfig, options: dict[str, Any], tmp_path: Path) -> None:
    train_for(40, tiny_config, tmp_path / "run", **options)
    with pytest.raises(UsageError, match="was planned for 40s: it ends at step 60"):
        train_for(50, tiny_config, tmp_path / "run", **options)
    horizon = ["train.steps=3", "schedule.decay_start=20", "schedule.decay_steps=5"]
    train_model(tiny_config, tmp_path / "planned", overrides=horizon, **options)
    with pytest.raises(UsageError, match="has a horizon: its decay ends at step 25"):
        train_for(40, tiny_config, tmp_path / "planned", **options)


def test_a_time_without_room_for_the_warm_up(tiny_config: RunConfig, options: dict[str, Any], tmp_path: Path) -> None:
    """25 steps at the peak and a fifth for the decay take 32 steps, 12 more than are measured; a tenth is added."""
    with pytest.raises(UsageError, match="5s are about 25 steps") as caught:
        train_for(5, tiny_config, tmp_path / "run", overrides=["schedule.warmup_steps=25"], **options)
    assert "--time 1m or more" in caught.value.fix
    assert train_for(60, tiny_config, tmp_path / "run", overrides=["schedule.warmup_steps=25"], **options).step > 60


def test_the_cost_of_a_step_has_its_part_of_everything_else(tiny_config: RunConfig) -> None:
    config = tiny_config.replace({"evaluation.every": 10, "sampling.every": 0, "checkpoint.every": 100})

    def record(kind: str, second: int, **fields: Any) -> Record:
        return {"kind": kind, "time": f"2026-01-01T00:00:{second:02}.000+00:00", **fields}

    records = [
        *(record("step", 0, **{**step_record(step), "seconds": 9.0 if step < 4 else 0.5}) for step in range(1, 7)),
        record("eval", 2, step=6),
        record("sample", 7, step=6),
        record("save", 8, step=6),
        record("stop", 9, step=6),
    ]
    assert step_cost(records, config, 3) == pytest.approx(0.5 + 2 / 10 + 1 / 100)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("90s", 90), (" 1H1M1S ", 3661)]
)
def test_a_time_is_read(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds
    assert parse_duration(describe_duration(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "-5m", "0s", "1.5h", "30 minutes", "m30"])
def test_what_is_no_time_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="is not a time"):
        parse_duration(text)
    assert command_line(["train", "x", f"--time={text}"], debug=False) == 2
    assert "30m, 2h or 1h30m" in capsys.readouterr().err
    assert not Path("x").exists()


def test_several_processes_are_refused(
    tiny_config: RunConfig, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="there are several"):
        train_for(40, tiny_config, tmp_path / "run", **options)


def test_a_new_run_without_a_configuration(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a preset nor a configuration"):
        train_for(40, None, tmp_path / "run", **options)
