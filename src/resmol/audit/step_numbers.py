"""Check the numbers of the step records: finite, and each learning rate and loss scale the one that has to be there."""

from __future__ import annotations

import math
from collections.abc import Iterator

from resmol.checks import Check, check_problems
from resmol.run.checkpoint_manifest import LossScale
from resmol.run.config_history import ConfigHistory
from resmol.run.ledger import Record, effective_steps
from resmol.system.wording import counted
from resmol.train.loss_scale import GROWTH_INTERVAL, after_step
from resmol.train.lr_schedule import lr_at


def finite_numbers(records: list[Record]) -> Check:
    """Check loss and gradient norm of each step; a step that was skipped in float16 has no norm."""
    steps = effective_steps(records).values()
    wanted = [(r["step"], (r["loss"],) if r.get("skipped") else (r["loss"], r["grad_norm"])) for r in steps]
    problems = [f"step {step}" for step, numbers in wanted if not all(map(_is_finite, numbers))]
    measured, guards = "every loss and gradient norm", "a diverged run"
    return check_problems("finite numbers", problems, measured, "no NaN or infinity", guards)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def learning_rate(records: list[Record], history: ConfigHistory) -> Check:
    """Compare with the closed form, under the configuration in force at each step."""
    problems, steps = [], effective_steps(records)
    for step, record in steps.items():
        config = history.at(record)
        wanted = lr_at(step, config.schedule, config.optimizer.lr)
        if record["lr"] != wanted:
            problems.append(f"step {step}: {record['lr']} instead of {wanted}")
    measured = f"equal to the closed form in {counted(len(steps), 'step')}"
    guards = "a schedule that jumps at the resume"
    return check_problems("learning rate", problems, measured, "exactly lr_at(step)", guards)


def loss_scale(records: list[Record], history: ConfigHistory) -> Iterator[Check]:
    """Check, where a run computed in float16, that each loss scale follows from the steps before it."""
    steps = [record for _, record in sorted(effective_steps(records).items())]
    scaled = [record for record in steps if history.at(record).runtime.precision == "float16"]
    scale, problems = LossScale(), list[str]()
    for record in scaled:
        skipped = record.get("skipped")
        if record.get("loss_scale") != scale.scale:
            problems.append(f"step {record['step']}: {record.get('loss_scale')} instead of {scale.scale}")
        if skipped != (record["grad_norm"] is None):
            problems.append(f"step {record['step']}: skipped is {skipped}, and the norm {record['grad_norm']}")
        scale = after_step(scale, skipped=bool(skipped))
    if scaled:
        yield check_problems(
            "loss scale", problems,
            f"by the rule in {counted(len(scaled), 'step')}, of which {scale.skipped_steps} overflowed",
            f"halved by a skipped step, doubled by {GROWTH_INTERVAL:,} others",
            "a scale that starts over at a resume, steps that update nothing and do not say so",
        )  # fmt: skip
