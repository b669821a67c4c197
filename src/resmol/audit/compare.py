"""`resmol audit A --against B`: where two runs that should be equal differ first, and which of them is right.

Seconds, times, sessions and places are no differences. What could explain others is named first: settings, data,
machine. Then the steps between the last state that both have and the first difference are executed again.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resmol.audit.audit import audit
from resmol.audit.replay import recorded_or_outcome
from resmol.audit.segment import Outcome, Segment, replay_segment, saved_digests
from resmol.checks import Check, Checks
from resmol.config.run_config import RunConfig
from resmol.run.checkpoint_manifest import list_checkpoints, open_checkpoint, step_of
from resmol.run.config_history import ConfigHistory
from resmol.run.directory import RunDir
from resmol.run.ledger import LedgerContent, Record, effective_steps, last_fact, read_ledger
from resmol.system.progress import step_progress
from resmol.system.wording import counted
from resmol.train.resume import changed_facts
from resmol.train.step_result import first_difference

logger = logging.getLogger(__name__)

GUARDS = "a copy that was changed, a machine that computes wrongly, two settings that were thought to be one"


@dataclass(frozen=True)
class Difference:
    """The first one: a field of a step's record, or a tensor of a checkpoint.

    Attributes:
        step: Where.
        field: Which; of a checkpoint its file and tensor.
        values: What the two runs have.
    """

    step: int
    field: str
    values: tuple[Any, Any]

    def __str__(self) -> str:
        return f"step {self.step}: {self.field} is {self.values[0]} in A and {self.values[1]} in B"


@dataclass(frozen=True)
class _Side:
    """One of the two runs."""

    label: str
    run: RunDir
    content: LedgerContent
    stored: RunConfig
    steps: dict[int, Record]

    @classmethod
    def of(cls, label: str, run: RunDir) -> _Side:
        content = read_ledger(run.ledger)
        return cls(label, run, content, run.load_config(), effective_steps(content.records))

    def head_after(self, lines: int) -> str:
        """Return the hash of a line."""
        records = self.content.records
        return str(records[lines]["prev"]) if lines < len(records) else self.content.head

    def saved(self) -> dict[int, Path]:
        """Return the checkpoints that are there, by step."""
        return {step_of(path): path for path in list_checkpoints(self.run.checkpoints)}

    def fact(self, name: str) -> Any:
        return last_fact(self.content.records, name)


def compare_runs(a: str | Path, b: str | Path, *, strict: bool = False) -> Checks:
    """Compare two runs that should be equal, as `resmol audit A --against B` does.

    Args:
        a: A run directory.
        b: Another one.
        strict: What cannot be judged here is a failure.

    Returns:
        A check for each thing that is compared; one that failed says where the runs differ.

    Raises:
        DataError: One of them is not a run directory, or has no ledger.
    """
    runs = {"A": RunDir(Path(a)), "B": RunDir(Path(b))}
    checks = Checks()
    for label, run in runs.items():
        checks.append(_own_audit(label, run))
    if not checks.passed:
        return checks
    sides = [_Side.of(label, run) for label, run in runs.items()]
    one, other = sides
    shared = _common_lines(one, other)
    settings = [_configuration(one, other), _data(one, other)]
    checks += [*settings, _environment(one, other)]
    difference = _first_difference(one, other, shared)
    checks += [_steps(one, other, shared, difference)]
    if difference is not None:
        same = all(check.passed for check in settings)
        checks.append(_who_is_right(one, other, difference, same_settings=same, strict=strict))
    return checks


def _own_audit(label: str, run: RunDir) -> Check:
    """Check that the record of a run is sound: else it says nothing."""
    found = audit(run)
    failed = [f"{check.name}: {check.measured}" for check in found if not check.passed]
    measured = "; ".join(failed[:3]) or f"{counted(len(found), 'check')} of its own passed"
    return Check(f"{label}: {run.path}", not failed, measured, "a record that holds together", GUARDS)


def _common_lines(one: _Side, other: _Side) -> int:
    """Return how many lines at the beginning are the same bytes: each hash covers all lines before it."""
    most = min(len(one.content.records), len(other.content.records))
    return bisect.bisect(range(1, most + 1), False, key=lambda n: one.head_after(n) != other.head_after(n))


def _configuration(one: _Side, other: _Side) -> Check:
    histories = [ConfigHistory(side.content.records, side.stored) for side in (one, other)]
    expected = "the same fields of class A and B at every step"
    compared: set[tuple[str, str]] = set()
    for step in sorted(one.steps.keys() & other.steps.keys()):
        configs = [history.at(side.steps[step]) for history, side in zip(histories, (one, other), strict=True)]
        hashes = (configs[0].sha256, configs[1].sha256)
        if hashes not in compared:
            compared.add(hashes)
            ours, theirs = (config.bound_fields() for config in configs)
            if found := _unequal(ours, theirs):
                return Check("configuration", False, f"at step {step}: {found}", expected, GUARDS)
    return Check("configuration", True, one.fact("config_sha256")[:16], expected, GUARDS)


def _unequal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return "; ".join(f"{name} is {ours.get(name)} in A and {theirs.get(name)} in B" for name in names)


def _data(one: _Side, other: _Side) -> Check:
    ours, theirs = one.fact("data_fingerprint"), other.fact("data_fingerprint")
    words = f"fingerprint {ours[:16]}" + ("" if ours == theirs else f" in A and {theirs[:16]} in B")
    return Check("data", ours == theirs, words, "the same tokens in the same order", GUARDS)


def _environment(one: _Side, other: _Side) -> Check:
    """Name what differs of the machines; it is no failure, but bits are promised on one kind only."""
    changed = changed_facts(one.fact("environment"), other.fact("environment"), one.stored)
    ours, theirs = ({fact: change[side] for fact, change in changed.items()} for side in ("from", "to"))
    words = _unequal(ours, theirs) or "the same kind of machine, and the same version of PyTorch"
    return Check("environment", True, words, "bits are promised on the same kind of machine only", GUARDS)


def _first_difference(one: _Side, other: _Side, shared: int) -> Difference | None:
    """Return the first step that differs, or the first checkpoint that does though the steps up to it are equal."""
    common = sorted(one.steps.keys() & other.steps.keys())
    new = common[bisect.bisect(common, shared, key=lambda step: one.steps[step]["seq"]) :]
    differing = ((step, first_difference(one.steps[step], other.steps[step])) for step in new)
    found = next(((step, field) for step, field in differing if field is not None), None)
    last = common[-1] if common else 0
    by_checkpoint = _first_checkpoint(one, other, last + 1 if found is None else found[0])
    if by_checkpoint is not None or found is None:
        return by_checkpoint
    step, field = found
    return Difference(step, field, (one.steps[step].get(field), other.steps[step].get(field)))


def _first_checkpoint(one: _Side, other: _Side, before: int) -> Difference | None:
    for step in _both_saved(one, other, before):
        ours, theirs = (_digests(side, step) for side in (one, other))
        names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        if names:
            return Difference(step, names[0], (ours.get(names[0], "")[:16], theirs.get(names[0], "")[:16]))
    return None


def _both_saved(one: _Side, other: _Side, before: int) -> list[int]:
    return sorted(step for step in one.saved().keys() & other.saved().keys() if step < before)


def _digests(side: _Side, step: int) -> dict[str, str]:
    return saved_digests(open_checkpoint(side.saved()[step]))


def _steps(one: _Side, other: _Side, shared: int, difference: Difference | None) -> Check:
    common = len(one.steps.keys() & other.steps.keys())
    copied = f"; the first {counted(shared, 'line')} are the same bytes" if shared else ""
    longer = "".join(
        f"; {side.label} has {counted(len(side.steps) - common, 'step')} more" for side in (one, other)
        if len(side.steps) > common
    )  # fmt: skip
    words = f"{counted(common, 'step')} with the same bits{copied}{longer}" if difference is None else f"{difference}"
    return Check("steps", difference is None and common > 0, words, "every recorded bit of every step", GUARDS)


def _who_is_right(one: _Side, other: _Side, difference: Difference, *, same_settings: bool, strict: bool) -> Check:
    """Execute the steps before the difference again, from the last checkpoint that both have, or from the start."""
    start = max(_both_saved(one, other, difference.step), default=0)
    segment = Segment(start, difference.step)
    outcomes = {one.label: _execute(one, segment)}
    if outcomes[one.label].verdict == "PASS" and same_settings:  # both cannot be, and one execution tells
        given, recorded = difference.values
        words = f"{difference.field} is {recorded}, and {given} comes out"
        outcomes[other.label] = Outcome("FAIL", words, f"at step {difference.step}")
    else:
        outcomes[other.label] = _execute(other, segment)
    right = [label for label, outcome in outcomes.items() if outcome.verdict == "PASS"]
    unknown = [label for label, outcome in outcomes.items() if outcome.verdict == "UNSUPPORTED"]
    reasons = "; ".join(
        f"{label}: {outcome.verdict} {outcome.where}: {outcome.words}".replace(" :", ":")
        for label, outcome in outcomes.items() if outcome.verdict != "PASS"
    )  # fmt: skip
    both = "both are what their own settings, data and machine give"
    verdicts = {("A",): "A is right", ("B",): "B is right", ("A", "B"): both}
    verdict = verdicts.get(tuple(right), "UNSUPPORTED: not to be said here" if unknown else "neither is right")
    words = f"{verdict}, by executing {segment} again{'; ' if reasons else ''}{reasons}"
    passed = bool(right) or (bool(unknown) and not strict)
    return Check("who is right", passed, words, "what an execution on this machine gives", GUARDS)


def _execute(side: _Side, segment: Segment) -> Outcome:
    source = recorded_or_outcome(side.run, side.content.records, side.stored)
    if isinstance(source, Outcome):
        return source
    logger.info(f"{side.label}: executing {segment} again")
    with step_progress(f"replay of {side.label}", len(segment.steps)) as advance:
        return replay_segment(source, segment, on_step=lambda _state: advance(1))
