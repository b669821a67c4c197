"""Rows K2 and K5: a process that dies at any call of a save, of the first moments of a run, and of retention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import drills
import pytest
import shim
from campaign import Campaign
from trials import INTERVAL, STEPS, Forks, Oracle, Setting, finish, step_bits, train_run

import resmol.train.loop

pytestmark = pytest.mark.usefixtures("shim")


def crash_points(
    forks: Forks, setting: Setting, folder: Path, names: list[str], share: int
) -> tuple[int, str, list[str]]:
    """Play the crash points of scenarios side by side; return how many points, the calls in words, the problems."""
    children = []
    for name in names:
        place = folder / name.replace(" ", "-")
        place.mkdir()
        out = place / "out.json"
        children.append((name, out, forks.start(drills.play, out, "crash_points", name, setting, place, share=share)))
    total, words, problems = 0, [], []
    for name, out, child in children:
        assert finish(child, timeout=600) == 0, name
        tried, calls, found = json.loads(out.read_text())
        total, problems = total + tried, problems + found
        words.append(f"{name} {calls}")
    return total, "calls: " + ", ".join(words), problems


def test_k2_crash_at_every_call_of_a_save(campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path) -> None:
    names = ["start", "resume", "first save", "save", "quarantine", "name taken", "save and prune"]
    share = campaign.count(7, 1)
    points, note, problems = crash_points(forks, setting, tmp_path, names, share)
    campaign.record(
        "K2", "process dies before, after or within any call of a save", "the old checkpoint or the new one, whole",
        problems, points, exhaustive=share == 1, note=note,
    )  # fmt: skip


def die_in_save(step: int, way: str, number: int, run: Path, setting: Setting) -> int:
    """Train; die at a call of the save of a step (or, in the way "count", return how many there are)."""
    real, calls = resmol.train.loop.save, []

    def armed(state: Any, session: Any, **options: Any) -> None:
        if state.step == step:
            shim.arm(run, way, k=number)
        real(state, session, **options)
        if state.step == step:
            # The calls of the thread that saves, and none of the steps after it.
            session.checkpointer.wait_until_finished()
            calls.append(shim.disarm())

    resmol.train.loop.save = armed
    code = train_run(run, setting)
    return calls[0] if way == "count" else code


def test_k2_training_goes_on_after_a_crash_in_a_save(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """The same with real training, relaunched to the end: a sample of the points."""
    count, draw, problems = campaign.count(4, 60), campaign.draw("K2"), []
    calls = forks.run(die_in_save, 2 * INTERVAL, "count", 1, tmp_path / "whole", setting)  # later ones prune as well
    for trial in range(count):
        run, step, way = tmp_path / f"run-{trial}", INTERVAL * draw.randint(1, 12), draw.choice(drills.WAYS)
        code = forks.run(die_in_save, step, way, draw.randint(1, calls), run, setting)
        found = [] if code == shim.KILLED else [f"ended with {code}"]
        code = forks.run(train_run, run, setting)
        found += oracle.differences(run) if code == 0 else [f"exit code {code}"]
        found += [] if max(step_bits(run)) == STEPS else ["the run is not complete"]
        problems += [f"trial {trial}: {text}" for text in found[:1]]
    campaign.record(
        "K2r", "the same, in a real training that is started again", "the same bits at the end", problems, count
    )


def test_k5_crash_at_every_call_of_retention(
    campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path
) -> None:
    share = campaign.count(2, 1)  # not a divisor of the three ways to die
    points, note, problems = crash_points(forks, setting, tmp_path, ["prune"], share)
    campaign.record(
        "K5", "process dies at any call of removing old checkpoints", "the newest stays, no half is ever chosen",
        problems, points, exhaustive=share == 1, note=note,
    )  # fmt: skip
