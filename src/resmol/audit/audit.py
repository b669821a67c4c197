"""Audit the record of a run: hash chain, continuity, learning rate, data order, checkpoints.

An audit reads; it never repairs, and nothing that it finds is a reason to delete anything.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

from resmol.audit.anchor import Trust, check_anchors, read_anchors
from resmol.audit.checkpoint_files import checkpoint_files
from resmol.audit.replay import ReplayOptions, replay
from resmol.audit.replay_all import CompleteReplay, replay_all
from resmol.audit.step_numbers import finite_numbers, learning_rate, loss_scale
from resmol.checks import Check, Checks, check_problems
from resmol.config.run_config import RunConfig
from resmol.data.loader import StepBatch
from resmol.data.sources import RunData, open_recorded
from resmol.errors import ConfigError, ResmolError
from resmol.run.config_history import ConfigHistory
from resmol.run.directory import RunDir
from resmol.run.ledger import (
    LedgerContent,
    LedgerTampered,
    Record,
    effective_steps,
    ends_comparison,
    last_fact,
    read_ledger,
    select,
)
from resmol.system.user_paths import user_path
from resmol.system.wording import counted
from resmol.train.build import make_loader, mixture_order
from resmol.train.step_result import LATER_FIELDS, REPRODUCIBLE_FIELDS, first_difference

logger = logging.getLogger(__name__)

FIELDS = {  # the fields of each kind of record that an audit reads
    "start": ("data_fingerprint", "config", "config_sha256", "environment"),
    "step": (
        "loss",
        "grad_norm",
        "tokens_seen",
        "windows_seen",
        "seconds",
        *(name for name in REPRODUCIBLE_FIELDS if name not in LATER_FIELDS),
    ),
    "save": ("permanent",),
    "resume": ("step", "next_step", "checkpoint", "manifest_sha256", "config_sha256", "environment"),
    "drift": ("changes",),
}


def audit(
    run: RunDir,
    *,
    strict: bool = False,
    replay_options: ReplayOptions | CompleteReplay | None = None,
    trust: Trust | None = None,
) -> list[Check]:
    """Check a run directory.

    Args:
        run: The run directory.
        strict: For a third party: a check that cannot be made here, and a ledger with a torn end, is a failure.
        replay_options: How much to execute again; None replays nothing.
        trust: Authorities and keys whose anchors count as verified; None knows nobody.

    Returns:
        The checks, failed ones included; with an unreadable ledger, that check alone.

    Raises:
        DataError: This is not a run directory, or it has no ledger.
    """
    run.require()
    try:
        content = read_ledger(run.ledger)
    except LedgerTampered as error:
        return [Check("hash chain", False, error.what, "every line carries the hash of the line before")]
    records = content.records
    if problems := list(_incomplete(records)):
        return [
            check_problems(
                "record fields", problems, "", "every record has its fields", "a ledger that resmol did not write"
            )
        ]
    stored = run.load_config()
    try:
        history = ConfigHistory(records, stored)
    except ConfigError as error:
        return [
            check_problems("configuration", [error.what], "", "fields that make a configuration", "a made-up ledger")
        ]
    checks = [
        _hash_chain(content, run, strict),
        _beginning(records),
        _continuity(records),
        _executions(records, history),
        _resumes(records),
        _tokens(records, history),
        finite_numbers(records),
        *loss_scale(records, history),
        learning_rate(records, history),
        _data_order(records, history, stored, run, strict),
    ]
    logger.info("reading every checkpoint back")
    checks += [_configuration(records, history, stored), *checkpoint_files(run, records)]
    trust = trust or Trust()
    checks += check_anchors(read_anchors(run, content, trust), content, trust, strict=strict)
    return [*checks, *_replayed(run, stored, content, replay_options)]


def audit_run(
    run: str | Path,
    *,
    replay: int | Literal["all"] = 0,
    replay_steps: int = 100,
    seed: int | None = None,
    strict: bool = False,
    inputs: Sequence[str | Path] = (),
    jobs: int = 1,
    progress_folder: str | Path | None = None,
    trust: Trust | None = None,
) -> Checks:
    """Check a run's record and checkpoints, and execute segments of it again, as `resmol audit` does.

    Args:
        run: The run directory.
        replay: How many random segments to execute again, bit for bit; ``"all"`` makes the whole run again, from its
            text to its last checkpoint.
        replay_steps: The most steps in a random segment.
        seed: Seed of the random choice of segments; None draws one.
        strict: What cannot be checked here is a failure.
        inputs: With ``"all"``: where the inputs of the data lie, in their order.
        jobs: With ``"all"``: how many segments to execute at once.
        progress_folder: With ``"all"``: where the progress is kept.
        trust: Authorities and keys whose anchors count as verified; None knows nobody.
    """
    options: ReplayOptions | CompleteReplay | None = None
    if replay == "all":
        folder = None if progress_folder is None else user_path(progress_folder)
        options = CompleteReplay(tuple(map(str, inputs)), jobs, folder, strict)
    elif replay:
        options = ReplayOptions(replay, replay_steps, secrets.randbelow(10**6) if seed is None else seed, strict)
    return Checks(audit(RunDir(Path(run)), strict=strict, replay_options=options, trust=trust))


def _replayed(
    run: RunDir, stored: RunConfig, content: LedgerContent, options: ReplayOptions | CompleteReplay | None
) -> list[Check]:
    if isinstance(options, CompleteReplay):
        return replay_all(run, stored, content, options)
    return [] if options is None else replay(run, stored, content.records, options)


def _incomplete(records: list[Record]) -> Iterator[str]:
    """Yield the records without a field that an audit reads: a chain can be forged whole."""
    for record in records:
        missing = [name for name in FIELDS.get(record["kind"], ()) if name not in record]
        if missing:
            yield f"line {record['seq']}: a {record['kind']} record without {', '.join(missing)}"


def _hash_chain(content: LedgerContent, run: RunDir, strict: bool) -> Check:
    """Say how long the chain is, and whether its end is torn."""
    lines = f"{counted(len(content.records), 'line')}, head {content.head[:16]}"
    torn = (
        f", and a torn end of {counted(len(content.torn), 'byte')} (repaired at the next start)" if content.torn else ""
    )
    whole = (
        not content.torn if strict else b"\n" not in content.torn
    )  # lines behind the zeros of a power cut are no torn line, and may be evidence
    return Check(
        "hash chain", whole, lines + torn, "every line carries the hash of the line before",
        guards="a record edited after the fact", evidence=str(run.ledger),
    )  # fmt: skip


def _beginning(records: list[Record]) -> Check:
    starts = [record["seq"] for record in select(records, "start")]
    problems = [] if starts == [1] else [f"start records at lines {starts}"]
    return check_problems(
        "beginning", problems, "one start record, the first line", "exactly that", "two runs spliced together"
    )


def _continuity(records: list[Record]) -> Check:
    problems = list(_jumps(records))
    steps = effective_steps(records)
    executed = sum(1 for _ in select(records, "step"))
    again = f"; {executed - len(steps)} executed again after a crash" if executed > len(steps) else ""
    measured = f"steps 1 to {max(steps, default=0)}, each once{again}"
    return check_problems("continuity", problems, measured, "no step missing or doubled", "a step skipped or repeated")


def _jumps(records: list[Record]) -> Iterator[str]:
    step = 0
    for record in records:
        if record["kind"] == "step":
            if record["step"] != step + 1:
                yield f"line {record['seq']}: step {record['step']} follows step {step}"
            step = record["step"]
        elif record["kind"] == "rewind":
            if not (record["from_step"] == step and 0 <= record["to_step"] < step):
                yield f"line {record['seq']}: rewind from {record['from_step']} to {record['to_step']} at step {step}"
            step = record["to_step"]


def _executions(records: list[Record], history: ConfigHistory) -> Check:
    """Check that a step that was executed again after a crash has the same bits, where they are promised."""
    first: dict[int, Record] = {}
    again, problems = 0, []
    for record in records:
        if ends_comparison(record):
            first = {}
        elif record["kind"] == "step" and history.at(record).runtime.determinism != "off":
            before = first.setdefault(record["step"], record)
            again += before is not record
            if name := first_difference(before, record):
                problems.append(f"line {record['seq']}: step {record['step']} was executed again with another {name}")
    measured = f"{again} executions compared with the first ones"
    guards = "a machine or code that gives other bits each time"
    return check_problems("executions", problems, measured, "the same bits each time", guards)


def _resumes(records: list[Record]) -> Check:
    """Check that each resume continues at the step after its checkpoint, and names a checkpoint that was saved."""
    saved: dict[str, Record] = {}
    problems, step, count = [], 0, 0
    for record in records:
        if record["kind"] == "step":
            step = record["step"]
        elif record["kind"] == "rewind":
            step = record["to_step"]
            saved = {name: kept for name, kept in saved.items() if kept["step"] <= step}
        elif record["kind"] == "save":
            saved[record["checkpoint"]] = record
        elif record["kind"] == "resume":
            count += 1
            if record["next_step"] != step + 1 or record["step"] != step:
                problems.append(f"line {record['seq']}: resumes at {record['next_step']} after step {step}")
            if saved.get(record["checkpoint"], record)["manifest_sha256"] != record["manifest_sha256"]:
                problems.append(f"line {record['seq']}: {record['checkpoint']} is not the one that was saved")
    measured = f"{counted(count, 'resume')}, each at the step after its checkpoint"
    return check_problems(
        "resumption",
        problems,
        measured,
        "each continues where its checkpoint ended",
        "a restart from scratch",
    )


def _tokens(records: list[Record], history: ConfigHistory) -> Check:
    problems, tokens, windows = [], 0, 0
    for step, record in sorted(effective_steps(records).items()):
        tokens += record["tokens"]
        windows += history.at(record).windows_per_step
        if record["tokens_seen"] != tokens:
            problems.append(f"step {step}: {counted(record['tokens_seen'], 'token')} seen, the sum is {tokens}")
        if record["windows_seen"] != windows:
            problems.append(f"step {step}: {counted(record['windows_seen'], 'window')} seen, the sum is {windows}")
    return check_problems(
        "tokens",
        problems,
        f"{counted(tokens, 'token')} in {counted(windows, 'window')}",
        "tokens_seen and windows_seen are the sums over the steps",
        "a counter that was reset",
    )


def _data_order(records: list[Record], history: ConfigHistory, stored: RunConfig, run: RunDir, strict: bool) -> Check:
    """Recompute the windows that each step had to read; needs the data's manifest, not its tokens."""
    name, expected = "data order", "window ids are the keyed permutation, with nothing repeated or skipped"
    try:
        data = open_recorded(run, stored.data)
    except ResmolError as error:
        return Check(name, not strict, f"not recomputed: {error.what}", expected, "a loader that starts over")
    if data.fingerprint != last_fact(records, "data_fingerprint"):
        return Check(name, False, "the data here is not the data of the run", expected, "exchanged data")
    problems = list(_wrong_windows(records, history, data))
    return check_problems(
        name, problems, "recomputed for every step", expected, "a loader that starts over at a resume"
    )


def _wrong_windows(records: list[Record], history: ConfigHistory, data: RunData) -> Iterator[str]:
    """Yield the steps that did not read the windows after those of the step before."""
    windows_seen, place = 0, None
    for config, stretch in groupby(sorted(effective_steps(records).items()), lambda item: history.at(item[1])):
        loader = None
        for step, record in stretch:
            loader = loader or make_loader(config, data.train, mixture_order(config, data, step - 1, place))
            wanted = loader.step_after(windows_seen)
            windows_seen = record["windows_seen"] if wanted.mixture is None else wanted.windows_seen
            place = wanted.mixture
            if record["windows"] != wanted.window_digest:
                yield f"step {step} read other windows"
            elif wanted.mixture is not None and _other_counts(record, wanted):
                yield f"step {step} states other windows or tokens of its sources"


def _other_counts(record: Record, wanted: StepBatch) -> bool:
    """Return whether a record has other counts by source; sources that were added later are not in it."""
    counts = ((wanted.mixture.seen if wanted.mixture else ()), wanted.source_tokens)
    stated = record.get("sources_seen"), record.get("sources_tokens")
    return any(
        not isinstance(found, list) or [*found, *[0] * (len(right) - len(found))] != list(right)
        for found, right in zip(stated, counts, strict=True)
    )


def _configuration(records: list[Record], history: ConfigHistory, stored: RunConfig) -> Check:
    """Check that the fields of class A and B are the recorded ones, and that each change of them has a drift record."""
    problems = [f"line {r['seq']}: another configuration, and no drift" for r in history.unrecorded_changes(records)]
    recorded, found = history.newest.bound_fields(), stored.bound_fields()
    problems += [
        f"config.toml: {key} is {found[key]}, not {recorded[key]}" for key in found if found[key] != recorded[key]
    ]
    runtime = stored.runtime
    library = "" if runtime.is_low_precision else f" by {runtime.matmul_backend}"
    arithmetic = f"{runtime.precision}{library}, compile {runtime.compile}, on {runtime.device}"
    return check_problems(
        "configuration", problems, f"{stored.sha256[:16]}; {arithmetic}",
        "config.toml as recorded, each change with a drift record",
        "a configuration edited later",
    )  # fmt: skip
