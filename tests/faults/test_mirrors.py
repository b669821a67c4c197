"""Rows L1 to L3: a machine that is lost with its disk; nothing is left but the mirror."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from random import Random

from campaign import Campaign
from trials import INTERVAL, STEPS, Forks, Oracle, Setting, error_of, step_bits, train_run

from resmol.run import mirror_places
from resmol.run.mirror_places import FolderPlace

CALLS = ("open", "read", "checkpoints", "fetch", "write_durable", "commit_directory", "remove_directory")


def test_l1_the_machine_is_lost_at_any_time(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """SIGKILL after a random time, and the run directory is gone; the same command goes on from the mirror."""
    count, draw = campaign.count(3, 100), campaign.draw("L1")
    started = time.perf_counter()
    assert forks.run(train_run, tmp_path / "whole", setting, mirror=str(tmp_path / "mirror")) == 0
    duration = time.perf_counter() - started
    problems = []
    for trial in range(count):
        run, mirror = tmp_path / f"run-{trial}", tmp_path / f"mirror-{trial}"
        child = forks.start(train_run, run, setting, mirror=str(mirror))
        time.sleep(draw.uniform(0, duration))
        child.kill()
        child.join()
        problems += goes_on(forks, setting, oracle, run, mirror, f"trial {trial}")
        shutil.rmtree(run)
        shutil.rmtree(mirror)
    campaign.record(
        "L1", "the machine and its disk lost at a random time", "the same bits from the mirror", problems, count
    )


def goes_on(forks: Forks, setting: Setting, oracle: Oracle, run: Path, mirror: Path, name: str) -> list[str]:
    """Lose the run directory, and go on from the mirror to the end."""
    reached = max(step_bits(run), default=0) if (run / "ledger.jsonl").exists() else 0
    shutil.rmtree(run, ignore_errors=True)
    kept = max(step_bits(mirror), default=0) if (mirror / "ledger.jsonl").exists() else 0
    code = forks.run(train_run, run, setting, mirror=str(mirror))
    found = oracle.differences(run) if code == 0 else [f"exit code {code}: {error_of(run)}"]
    found += [f"only {max(step_bits(run))} steps"] if code == 0 and max(step_bits(run)) != STEPS else []
    found += [f"{reached - kept} steps were lost"] if reached - kept > 3 * INTERVAL else []
    return [f"{name}: {text}" for text in found[:1]]


def die_in_the_copy(call: str, number: int, run: Path, setting: Setting, mirror: Path) -> int:
    """Train; be killed before the call of this number of one kind that the mirror makes."""
    where = FolderPlace if hasattr(FolderPlace, call) else mirror_places
    real, calls = getattr(where, call), [0]

    def die(*values: object) -> object:
        calls[0] += 1
        if calls[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*values)

    setattr(where, call, die)
    return train_run(run, setting, mirror=str(mirror))


def test_l2_the_machine_is_lost_during_a_copy(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """Killed at each kind of call of the copy, early and late; in the campaign at every one of the first 25."""
    draw, problems, trials = campaign.draw("L2"), [], 0
    for call in CALLS if campaign.full else draw.sample(CALLS, 3):
        for number in range(1, 26) if campaign.full else [draw.randint(2, 12)]:
            run, mirror = tmp_path / f"{call}-{number}", tmp_path / f"mirror-{call}-{number}"
            forks.run(die_in_the_copy, call, number, run, setting, mirror)
            problems += goes_on(forks, setting, oracle, run, mirror, f"{call} {number}")
            trials += 1
            shutil.rmtree(run)
            shutil.rmtree(mirror)
    campaign.record(
        "L2", "the machine lost at a call of the copy to the mirror", "the same bits from the mirror", problems, trials
    )


def test_l3_two_machines_on_one_mirror(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """Both go on from the same mirror at the same time: one ends, the other is refused, and what is kept is whole."""
    count, draw, problems = campaign.count(1, 20), campaign.draw("L3"), []
    for trial in range(count):
        first, mirror = tmp_path / f"first-{trial}", tmp_path / f"mirror-{trial}"
        assert forks.run(train_run, first, setting, "train.steps=20", mirror=str(mirror)) == 0
        problems += race(forks, setting, oracle, tmp_path / f"race-{trial}", first, mirror, draw)
    campaign.record("L3", "two machines on one mirror", "one is refused, and no bit is wrong", problems, count)


def race(
    forks: Forks, setting: Setting, oracle: Oracle, folder: Path, first: Path, mirror: Path, draw: Random
) -> list[str]:
    """Let two machines that hold the same run go on with one mirror; return what is wrong afterwards."""
    folder.mkdir()
    runs = [folder / "one", folder / "two"]
    children = []
    for run in runs:
        shutil.copytree(first, run)
    for run in runs:
        children.append(forks.start(train_run, run, setting, mirror=str(mirror)))
        time.sleep(draw.uniform(0, 0.2))
    for child in children:
        child.join()
    codes = sorted(child.exitcode for child in children)
    found = [] if codes == [0, 75] else [f"exit codes {codes}"]
    for run in runs:
        found += oracle.differences(run)[:1]
    shutil.rmtree(folder)
    folder.mkdir()
    code = forks.run(train_run, folder / "three", setting, mirror=str(mirror))
    return found + (oracle.differences(folder / "three")[:1] if code == 0 else [f"exit code {code} afterwards"])
