"""Execute a segment of a run again, from the initial weights or a checkpoint, and compare every recorded bit.

If the segment ends at a checkpoint, all tensors and counters in it are compared as well. A different machine from the
recorded one is no failure: bits are promised only on the same kind, unless the run is portable.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from resmol.checks import Check
from resmol.config.run_config import RunConfig
from resmol.data.loader import Loader
from resmol.data.shards import verify_shards
from resmol.data.sources import RunData, datasets_of, open_recorded
from resmol.errors import CheckFailed, ConfigError, DataError, ResmolError
from resmol.run.checkpoint import allocate_moments, digest_all
from resmol.run.checkpoint_manifest import Checkpoint, checkpoint_name, list_checkpoints, open_checkpoint, step_of
from resmol.run.config_history import ConfigHistory
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, effective_steps, ends_comparison, last_fact
from resmol.system.wording import counted
from resmol.train.build import compile_blocks, new_state, train_loader
from resmol.train.compiler import require_compiler
from resmol.train.devices import find_device
from resmol.train.parallel import Runtime, open_runtime
from resmol.train.portable import require_portable
from resmol.train.resume import changed_facts, restore
from resmol.train.step import TrainState, train_step
from resmol.train.step_result import first_difference

GUARDS = "A ledger that was made up, a machine that computes wrongly, data or code that is not what was trained with."
EXPECTED = "the recorded loss, gradient norm, learning rate, tokens and windows of every step, bit for bit"
# Of a saved state, what an execution gives again. The place in a mixture is longer where a source was added later, and
# the windows of each step tell it as well.
COUNTERS = ("tokens_seen", "windows_seen", "loss_scale")

Verdict = Literal["PASS", "FAIL", "UNSUPPORTED"]


@dataclass(frozen=True)
class Segment:
    """Steps ``start`` + 1 to ``end``, to be executed again from the state after ``start`` (0: the initial one)."""

    start: int
    end: int

    @property
    def steps(self) -> range:
        """Their numbers."""
        return range(self.start + 1, self.end + 1)

    def __str__(self) -> str:
        return f"steps {self.start + 1} to {self.end}" if self.end - self.start > 1 else f"step {self.end}"


@dataclass(frozen=True)
class Outcome:
    """What came of a part of a replay.

    Attributes:
        verdict: UNSUPPORTED where it cannot be judged here.
        words: What was found.
        where: Such as ``at step 12``; empty where the name of the part says it.
        evidence: The file in which to look.
    """

    verdict: Verdict
    words: str
    where: str = ""
    evidence: str = ""

    def check(self, name: str, *, strict: bool = False, expected: str = EXPECTED) -> Check:
        """Return the check that reports it; with ``strict``, what cannot be judged fails."""
        passed = self.verdict == "PASS" or (self.verdict == "UNSUPPORTED" and not strict)
        place = f" {self.where}" if self.where else ""
        return Check(name, passed, f"{self.verdict}{place}: {self.words}", expected, GUARDS, self.evidence)


@dataclass(frozen=True)
class Recorded:
    """A run as its ledger has it: what is executed again, and what the result is compared with.

    Attributes:
        run: The run directory.
        records: Its ledger, whose chain was verified.
        stored: Its configuration.
        data: What it was trained on.
    """

    run: RunDir
    records: list[Record]
    stored: RunConfig
    data: RunData

    @classmethod
    def of(cls, run: RunDir, records: list[Record], stored: RunConfig, *, verify: bool = True) -> Recorded:
        """Open the data of a run.

        Args:
            run: The run directory.
            records: Its ledger.
            stored: Its configuration.
            verify: Compare every byte of the tokens with the hash in their manifest.

        Raises:
            DataError: The tokens are not here.
            CheckFailed: They were changed, or the ledger was written with others.
        """
        data = open_recorded(run, stored.data)
        if data.fingerprint != last_fact(records, "data_fingerprint"):
            raise CheckFailed("the data here is not the data of the run", fix="restore the folder from a copy")
        for dataset in datasets_of(data).values() if verify else ():
            try:
                verify_shards(dataset)
            except DataError as error:
                raise CheckFailed(error.what, fix=error.fix) from error
        return cls(run, records, stored, data)

    @cached_property
    def steps(self) -> dict[int, Record]:
        """The steps that make up its history."""
        return effective_steps(self.records)

    @cached_property
    def history(self) -> ConfigHistory:
        """The configuration in force at each line."""
        return ConfigHistory(self.records, self.stored)

    @cached_property
    def _changes(self) -> list[int]:
        """The lines of the ledger after which steps were computed in another way, schedules aside."""
        return [record["seq"] for record in self.records if ends_comparison(record) and not _plans_only(record)]

    def checkpoint(self, step: int) -> Path:
        """Return where the checkpoint of a step lies, if it is still there."""
        return self.run.checkpoints / checkpoint_name(step)

    def environment(self, step: int) -> dict[str, Any]:
        """Return the facts about the machine that executed a step."""
        before = bisect.bisect_left(self.records, self.steps[step]["seq"], key=lambda record: record["seq"])
        facts: dict[str, Any] = last_fact(self.records[:before], "environment")
        return facts

    def stretches(self, segment: Segment) -> Iterator[Segment]:
        """Yield the parts of a segment in each of which one configuration and one kind of machine was in force."""
        for _, part in groupby(segment.steps, lambda step: bisect.bisect(self._changes, self.steps[step]["seq"])):
            steps = list(part)
            yield Segment(steps[0] - 1, steps[-1])


def _plans_only(record: Record) -> bool:
    """Return whether a record is a drift of the schedule alone, which each step's own configuration follows."""
    return record["kind"] == "drift" and all(key.startswith("schedule.") for key in record["changes"])


def segments(run: RunDir, records: list[Record], limit: int | None = None) -> list[Segment]:
    """Return every segment that the run's checkpoints allow, in order, of ``limit`` steps at most."""
    last = max(effective_steps(records), default=0)
    saved = {step for path in list_checkpoints(run.checkpoints) if (step := step_of(path)) < last}
    starts = sorted({0, *saved})
    ends = [*starts[1:], last]
    return [Segment(a, b if limit is None else min(b, a + limit)) for a, b in zip(starts, ends, strict=True) if b > a]


def replay_segment(
    source: Recorded,
    segment: Segment,
    *,
    begin: Path | None = None,
    on_step: Callable[[TrainState], None] = lambda _state: None,
) -> Outcome:
    """Execute a segment again.

    Args:
        source: The run.
        segment: Which steps.
        begin: A checkpoint within the segment, of an earlier execution of it; None begins at the run's own.
        on_step: Called after each step that gave the recorded bits.
    """
    state: TrainState | None = None
    first = Segment(segment.start if begin is None else step_of(begin), segment.end)
    for stretch in source.stretches(first):
        try:
            config = source.history.at(source.steps[stretch.start + 1])
            require_compiler(config, find_device(config.runtime.device).type)
            require_portable(config)
        except ConfigError as error:
            return Outcome("UNSUPPORTED", error.what)
        if config.runtime.determinism == "off":
            return Outcome("UNSUPPORTED", "runtime.determinism is off: no bits are promised", _from(stretch, segment))
        environment = source.environment(stretch.start + 1)
        with open_runtime(config.replace({"runtime.threads": environment["threads"]})) as runtime:
            if differences := _differences(environment, runtime, config):
                return Outcome("UNSUPPORTED", f"another machine or library: {differences}", _from(stretch, segment))
            before, state = state, new_state(config, runtime)
            try:
                if before is not None:
                    hand_over(before, state)
                elif stretch.start:
                    restore(state, open_checkpoint(begin or source.checkpoint(stretch.start)))
            except ResmolError as error:
                return Outcome("FAIL", error.what)
            if failed := _execute(source, stretch, state, config, runtime, on_step):
                return failed
    assert state is not None, "a segment has steps"
    return _compare_state(source, segment, state)


def _from(stretch: Segment, segment: Segment) -> str:
    return "" if stretch.start == segment.start else f"from step {stretch.start + 1} on"


def hand_over(before: TrainState, after: TrainState) -> None:
    """Fill a new state with weights, moments and counters of another one, as a checkpoint between them would."""
    allocate_moments(after.optimizer, before.loss_scale.updates(before.step))
    ours = before.tensors().files
    for name, tensors in after.tensors().files.items():
        for key, tensor in tensors.items():
            tensor.detach().copy_(ours[name][key])
    for counter in ("step", "tokens_seen", "windows_seen", "mixture", "recent_losses", "loss_scale"):
        setattr(after, counter, getattr(before, counter))


def _execute(
    source: Recorded, stretch: Segment, state: TrainState, config: RunConfig, runtime: Runtime,
    on_step: Callable[[TrainState], None],
) -> Outcome | None:  # fmt: skip
    """Execute the steps of a stretch; return the first difference from what was recorded."""
    compile_blocks(state.model, config)
    loader = train_loader(config, source.data, state)
    for step in stretch.steps:
        record = source.steps[step]
        in_force = source.history.at(record)  # a decay may have been planned meanwhile
        try:
            wrong = _difference(state, record, in_force, loader, runtime)
        except ResmolError as error:
            return Outcome("FAIL", error.what, f"at step {step}")
        if wrong:
            return Outcome("FAIL", wrong, f"at step {step}")
        on_step(state)
    return None


def _difference(state: TrainState, record: Record, config: RunConfig, loader: Loader, runtime: Runtime) -> str | None:
    """Execute the step after ``state`` and return the first field that is not as recorded."""
    found = train_step(state, loader.step_after(state.windows_seen), config, runtime).to_record()
    name = first_difference(record, found)
    return None if name is None else f"{name} is {found.get(name)}, recorded is {record.get(name)}"


def _compare_state(source: Recorded, segment: Segment, state: TrainState) -> Outcome:
    """Compare all tensors and counters with the checkpoint at the segment's end, if there is one."""
    path, steps = source.checkpoint(segment.end), counted(len(segment.steps), "step")
    if not path.is_dir():
        return Outcome("PASS", steps)
    try:
        checkpoint = open_checkpoint(path)
    except ResmolError as error:
        return Outcome("FAIL", error.what)
    recorded, ours = saved_digests(checkpoint), digests(state)
    wrong = sorted(name for name in {*recorded, *ours} if recorded.get(name) != ours.get(name))
    wrong += [name for name in COUNTERS if getattr(checkpoint.state, name) != getattr(state, name)]
    if wrong:
        return Outcome("FAIL", f"{wrong[0]} differs from {path.name}", evidence=str(path))
    return Outcome("PASS", f"{steps}, and the {counted(len(ours), 'tensor')} of {path.name}", evidence=str(path))


def digests(state: TrainState) -> dict[str, str]:
    """Return the digest of each tensor of a state, by file and name."""
    return _by_file({file: digest_all(tensors) for file, tensors in state.tensors().files.items()})


def saved_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the digest of each tensor of a checkpoint, as its manifest states them, by file and name."""
    return _by_file({file: entry.tensors for file, entry in checkpoint.manifest.files.items()})


def _by_file(files: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {f"{file}/{name}": value for file, tensors in files.items() for name, value in tensors.items()}


def _differences(recorded: dict[str, Any], runtime: Runtime, config: RunConfig) -> str:
    changed = changed_facts(recorded, runtime.environment(), config)
    return ", ".join(f"{fact} {change['from']} -> {change['to']}" for fact, change in changed.items())
