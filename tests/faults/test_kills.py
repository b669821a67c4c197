"""Rows K1, K4, K6, K7, K8: a process that is killed, at any time and again and again."""

from __future__ import annotations

import time
from pathlib import Path

from campaign import Campaign
from trials import INTERVAL, STEPS, Forks, Oracle, Setting, finish, step_bits, train_run


def test_k1_killed_at_any_time(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """SIGKILL after a random time; relaunched until done."""
    count, draw = campaign.count(10, 200), campaign.draw("K1")
    started = time.perf_counter()
    assert forks.run(train_run, tmp_path / "whole", setting) == 0
    duration = time.perf_counter() - started
    problems, lost = [], 0
    for trial in range(count):
        run = tmp_path / f"run-{trial}"
        child = forks.start(train_run, run, setting)
        time.sleep(draw.uniform(0, duration))
        child.kill()
        child.join()
        reached = max(step_bits(run), default=0) if (run / "ledger.jsonl").exists() else 0
        code = forks.run(train_run, run, setting)
        differences = oracle.differences(run) if code == 0 else [f"exit code {code}"]
        problems += [f"trial {trial}: {text}" for text in differences[:1]]
        lost = max(lost, reached % INTERVAL)
    campaign.record(
        "K1", "SIGKILL at a random time", "the same bits after a restart", problems, count,
        note=f"at most {lost} steps executed again of {STEPS}",
    )  # fmt: skip
