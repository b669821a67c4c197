"""Replay: execute randomly chosen segments of a run again and compare every recorded bit (segment.py).

A segment starts at the initial weights (a function of the seed) or at a checkpoint that is still there, and ends at
the next one, at the end of the run, or after a limit of steps.
"""

from __future__ import annotations

import logging
import random
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from resmol.audit.segment import GUARDS, Outcome, Recorded, Segment, replay_segment, segments
from resmol.checks import Check
from resmol.config.run_config import RunConfig
from resmol.errors import CheckFailed, ResmolError
from resmol.run.checkpoint_manifest import MANIFEST
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, effective_steps, select
from resmol.system.locks import kept_while_read
from resmol.system.wording import counted

logger = logging.getLogger(__name__)


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
        return [Outcome("UNSUPPORTED", "there is no step to execute again").check("replay", strict=options.strict)]
    draw = random.Random(options.seed)  # noqa: S311
    drawn = sorted(draw.sample(possible, min(options.count, len(possible))), key=lambda s: s.start)
    source = recorded_or_outcome(run, records, config)
    if isinstance(source, Outcome):
        return [source.check("replay", strict=options.strict)]
    checks, started = [], time.perf_counter()
    with keep_checkpoints(source, drawn):
        for segment in drawn:
            logger.info(f"replay: {segment}")
            checks.append(replay_segment(source, segment).check(f"replay of {segment}", strict=options.strict))
    return [*checks, _summary(records, possible, drawn, checks, time.perf_counter() - started, options)]


def recorded_or_outcome(run: RunDir, records: list[Record], config: RunConfig) -> Recorded | Outcome:
    """Return a run with its data, every byte of which was compared; or why it cannot be executed again."""
    try:
        return Recorded.of(run, records, config)
    except CheckFailed as error:
        return Outcome("FAIL", error.what)
    except ResmolError as error:
        return Outcome("UNSUPPORTED", f"the tokens are not here ({error.what})")


def keep_checkpoints(source: Recorded, wanted: list[Segment]) -> ExitStack:
    """Return a context in which the checkpoints at the borders of segments are kept, though the run may be trained."""
    hold = ExitStack()
    for step in {step for segment in wanted for step in (segment.start, segment.end)}:
        with suppress(FileNotFoundError):  # not every segment ends at a checkpoint
            hold.enter_context(kept_while_read(source.checkpoint(step) / MANIFEST))
    return hold


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
