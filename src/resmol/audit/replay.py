"""Replay: execute parts of a run again, from its own checkpoints, and compare every recorded bit.

A segment starts at the initial weights (a function of the seed) or at a checkpoint that is still there, and ends at
the next one, at the end of the run, or after a limit of steps. If it ends at a checkpoint, weights and moments are
compared as well. A different machine from the recorded one is no failure: bits are promised only on the same kind.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from resmol.checks import Check
from resmol.config.run_config import RunConfig
from resmol.data.loader import Loader
from resmol.data.shards import verify_shards
from resmol.data.sources import RunData, datasets_of, open_recorded
from resmol.errors import ConfigError, ResmolError
from resmol.run.checkpoint import digest_all
from resmol.run.checkpoint_manifest import (
    MANIFEST,
    checkpoint_name,
    list_checkpoints,
    open_checkpoint,
    read_manifest,
    step_of,
)
from resmol.run.config_history import ConfigHistory
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, effective_steps, last_fact, select
from resmol.system.locks import kept_while_read
from resmol.system.wording import counted
from resmol.train.build import compile_blocks, new_state, train_loader
from resmol.train.compiler import require_compiler
from resmol.train.devices import find_device
from resmol.train.loop import TrainState, train_step
from resmol.train.parallel import Runtime, open_runtime
from resmol.train.resume import bitwise_facts, restore
from resmol.train.step_result import first_difference

logger = logging.getLogger(__name__)

GUARDS = "A ledger that was made up, a machine that computes wrongly, data or code that is not what was trained with."
EXPECTED = "the recorded loss, gradient norm, learning rate, tokens and windows of every step, bit for bit"


@dataclass(frozen=True)
class Segment:
    """Steps ``start`` + 1 to ``end``, to be executed again from the state after ``start`` (0: the initial one)."""

    start: int
    end: int


@dataclass(frozen=True)
class ReplayOptions:
    """How much to replay.

    Attributes:
        count: Segments to draw.
        limit: Steps of a segment at most.
        seed: Seed of the random choice of segments, picked by the auditor after the run.
        strict: Whether a segment that cannot be replayed here is a failure.
    """

    count: int
    limit: int = 100
    seed: int = 0
    strict: bool = False


def segments(run: RunDir, records: list[Record], limit: int) -> list[Segment]:
    """Return every segment that the run's checkpoints allow, in order."""
    last = max(effective_steps(records), default=0)
    starts = sorted({0, *(step_of(path) for path in list_checkpoints(run.checkpoints))})
    ends = [*starts[1:], last]
    return [Segment(a, min(b, a + limit)) for a, b in zip(starts, ends, strict=True) if min(b, a + limit) > a]


def replay(run: RunDir, config: RunConfig, records: list[Record], options: ReplayOptions) -> list[Check]:
    """Execute randomly chosen segments again.

    Args:
        run: The run directory.
        config: Its configuration.
        records: Its ledger, whose chain was verified.
        options: How much to replay.

    Returns:
        A check for each segment, whose measured text begins with PASS, FAIL or UNSUPPORTED, and one about them all.
    """
    possible = segments(run, records, options.limit)
    if not any(select(records, "start")) or not possible:
        return [_unsupported("replay", "there is no step to execute again", options)]
    draw = random.Random(options.seed)  # noqa: S311
    drawn = sorted(draw.sample(possible, min(options.count, len(possible))), key=lambda s: s.start)
    try:
        data = open_recorded(run, config.data)
        if data.fingerprint != last_fact(records, "data_fingerprint"):
            return [Check("replay", False, "FAIL: the data here is not the data of the run", EXPECTED, GUARDS)]
        for dataset in datasets_of(data).values():
            verify_shards(dataset)
    except ResmolError as error:
        return [_unsupported("replay", f"the tokens are not here ({error.what})", options)]
    checks, started = [], time.perf_counter()
    with ExitStack() as hold:
        for step in {step for segment in drawn for step in (segment.start, segment.end)}:
            with suppress(FileNotFoundError):  # not every segment ends at a checkpoint
                hold.enter_context(kept_while_read(run.checkpoints / checkpoint_name(step) / MANIFEST))
        for segment in drawn:
            logger.info(f"replay: steps {segment.start + 1} to {segment.end}")
            checks.append(_replay_segment(run, config, records, segment, data, options))
    return [*checks, _summary(records, possible, drawn, checks, time.perf_counter() - started, options)]


def _replay_segment(
    run: RunDir, stored: RunConfig, records: list[Record], segment: Segment, data: RunData, options: ReplayOptions
) -> Check:
    name = f"replay of steps {segment.start + 1} to {segment.end}"
    steps = effective_steps(records)
    first, last = steps[segment.start + 1]["seq"], steps[segment.end]["seq"]
    drifts = [record for record in select(records, "drift") if first < record["seq"] < last]
    if any(not key.startswith("schedule.") for record in drifts for key in record["changes"]):
        return _unsupported(name, "the configuration was changed between these steps", options)
    history = ConfigHistory(records, stored)
    try:
        config = history.at(steps[segment.start + 1])
        require_compiler(config, find_device(config.runtime.device).type)
    except ConfigError as error:
        return _unsupported(name, error.what, options)
    environment = _environment_at(records, first)
    same_threads = config.replace({"runtime.threads": environment["threads"]})
    with open_runtime(same_threads) as runtime:
        if differences := _differences(environment, runtime, config):
            return _unsupported(name, f"another machine or library: {differences}", options)
        state = new_state(config, runtime)
        path = run.checkpoints / checkpoint_name(segment.start)
        try:
            if segment.start:
                restore(state, open_checkpoint(path))
        except ResmolError as error:
            return Check(name, False, f"FAIL: {error.what}", EXPECTED, GUARDS)
        compile_blocks(state.model, config)
        loader = train_loader(config, data, state)
        for step in range(segment.start + 1, segment.end + 1):
            in_force = history.at(steps[step])  # a decay may have been planned meanwhile
            if wrong := _execute(state, steps[step], in_force, loader, runtime):
                return Check(name, False, f"FAIL at step {step}: {wrong}", EXPECTED, GUARDS)
    return _compare_state(name, state, run, segment)


def _execute(state: TrainState, record: Record, config: RunConfig, loader: Loader, runtime: Runtime) -> str | None:
    """Execute the step after ``state`` and return the first field that is not as recorded."""
    found = train_step(state, loader.step_after(state.windows_seen), config, runtime).to_record()
    name = first_difference(record, found)
    return None if name is None else f"{name} is {found.get(name)}, recorded is {record.get(name)}"


def _compare_state(name: str, state: TrainState, run: RunDir, segment: Segment) -> Check:
    """Compare all tensors with the checkpoint at the segment's end, if there is one."""
    path, count = run.checkpoints / checkpoint_name(segment.end), segment.end - segment.start
    if not path.is_dir():
        return Check(name, True, f"PASS: {counted(count, 'step')}", EXPECTED, GUARDS)
    try:
        files = read_manifest(path).files
    except ResmolError as error:
        return Check(name, False, f"FAIL: {error.what}", EXPECTED, GUARDS)
    recorded = {file: entry.tensors for file, entry in files.items() if entry.tensors}
    ours = {file: digest_all(tensors) for file, tensors in state.tensors().files.items()}
    if wrong := sorted(_unequal(ours, recorded)):
        return Check(name, False, f"FAIL: {wrong[0]} differs from {path.name}", EXPECTED, GUARDS, str(path))
    tensors = counted(sum(map(len, ours.values())), "tensor")
    words = f"PASS: {counted(count, 'step')}, and the {tensors} of {path.name}"
    return Check(name, True, words, EXPECTED, GUARDS, str(path))


def _unequal(ours: Mapping[str, Mapping[str, str]], recorded: Mapping[str, Mapping[str, str]]) -> set[str]:
    """Return the tensors, as file and name, whose digests differ or that one of the two lacks."""
    flat = [{(file, name, value) for file, group in side.items() for name, value in group.items()}
            for side in (ours, recorded)]  # fmt: skip
    return {f"{file}/{name}" for file, name, _ in flat[0] ^ flat[1]}


def _environment_at(records: list[Record], seq: int) -> dict[str, Any]:
    """Return the facts about the machine that executed what the ledger's line ``seq`` records."""
    environment: dict[str, Any] = last_fact([record for record in records if record["seq"] < seq], "environment")
    return environment


def _differences(recorded: dict[str, Any], runtime: Runtime, config: RunConfig) -> str:
    here, facts = runtime.environment(), bitwise_facts(config)
    return ", ".join(f"{n} {recorded.get(n)} -> {here[n]}" for n in facts if recorded.get(n) != here[n])


def _unsupported(name: str, why: str, options: ReplayOptions) -> Check:
    return Check(name, not options.strict, f"UNSUPPORTED: {why}", EXPECTED, GUARDS)


def _summary(
    records: list[Record], possible: list[Segment], drawn: list[Segment], checks: list[Check], seconds: float,
    options: ReplayOptions,
) -> Check:  # fmt: skip
    """Summarize what was executed again, what it cost, and which share of wrong segments the draw would have missed.

    If a share f of the segments is wrong, each drawn one is right with probability 1 - f, and all K are with
    (1 - f)^K at most (the draw is without replacement); that is 5 % at ``f = 1 - 0.05^(1/K)``.
    """
    steps = effective_steps(records)
    passed = [s for s, check in zip(drawn, checks, strict=True) if check.measured.startswith("PASS")]
    executed = sum(s.end - s.start for s in passed)
    reachable = sum(s.end - s.start for s in possible)
    cost = seconds / max(1e-9, sum(record["seconds"] for record in steps.values()))
    bound = 0.0 if len(passed) == len(possible) else 1 - 0.05 ** (1 / len(passed)) if passed else 1.0
    claim = (
        f"if over {100 * bound:.0f} % of those were wrong, this draw would have met one with 95 % probability"
        if bound
        else "all of them were replayed"
    )
    words = (
        f"{executed:,} of {len(steps):,} steps executed again in {seconds:.0f} s ({100 * cost:.1f} % of the run's "
        f"time; draw {options.seed}); the checkpoints allow {counted(len(possible), 'segment')} with "
        f"{counted(reachable, 'step')}: {claim}"
    )
    return Check("replay in all", bool(passed) or not options.strict, words, "at least one segment replayed", GUARDS)
