"""A launcher's variables are a set: all of them and consistent, none, or a refusal."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from resmol.config.run_config import RunConfig
from resmol.errors import UsageError
from resmol.system.launcher import OTHER_LAUNCHERS, VARIABLES, Launch, this_launch
from resmol.train.start import train_model

COMPLETE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}


def test_none_is_one_process_and_all_are_a_rank() -> None:
    assert this_launch({"PATH": "/bin", "LOCAL_WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "1"}) == Launch(0, 1, 0, 1)
    assert this_launch(COMPLETE) == Launch(3, 4, 1, 1)
    assert this_launch(COMPLETE | {"LOCAL_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}) == Launch(3, 4, 1, 2)


def test_some_are_refused_by_name() -> None:
    for size in range(1, len(VARIABLES)):
        for names in itertools.combinations(VARIABLES, size):
            for value in ({name: COMPLETE[name] for name in names}, dict.fromkeys(VARIABLES, "") | {names[0]: "1"}):
                with pytest.raises(UsageError, match="only partly there") as refused:
                    this_launch(value)
                assert all(name in refused.value.what for name in VARIABLES)
                assert all(name in refused.value.fix for name in names)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "4"), ("RANK", "-1"), ("RANK", "one"), ("RANK", "1.0"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "3"),
        ("LOCAL_RANK", "2"), ("MASTER_PORT", "0"), ("MASTER_PORT", "65536"), ("LOCAL_WORLD_SIZE", "5"),
        ("LOCAL_WORLD_SIZE", "1"), ("WORLD_SIZE", "9" * 5000),
    ],
)  # fmt: skip
def test_contradictions_are_refused(name: str, value: str) -> None:
    with pytest.raises(UsageError, match="has to be a whole number"):
        this_launch(COMPLETE | {"LOCAL_WORLD_SIZE": "2"} | {name: value})


@pytest.mark.parametrize("name", OTHER_LAUNCHERS)
def test_processes_of_other_launchers_would_train_alone(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        this_launch({name: "2"})


def test_a_left_over_rank_trains_nothing(
    tmp_path: Path, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError, match="RANK is set; WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are not"):
        train_model(tiny_config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
