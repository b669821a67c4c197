"""`resmol audit RUN --replay all`: the whole run again, from its text to its last checkpoint; only the code is trusted.

The segments between checkpoints begin at checkpoints that nothing has confirmed yet, so that several can be executed at
once. Each one ends by comparing the checkpoint at which the next one began: together they show what one execution from
the initial weights would.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from resmol.audit.certificate import COMPLETE
from resmol.audit.raw_text import TEXT_EXPECTED, TOKENS_EXPECTED, inputs_by_source, prepare_again
from resmol.audit.replay import keep_checkpoints, recorded_or_outcome
from resmol.audit.replay_progress import ReplayProgress, StateKeeper, segment_name
from resmol.audit.report import duration
from resmol.audit.segment import GUARDS, Outcome, Recorded, Segment, replay_segment, segments
from resmol.checks import Check
from resmol.config.run_config import RunConfig
from resmol.data.sources import datasets_of
from resmol.errors import Interrupted
from resmol.model.flops import total_parameters
from resmol.model.llama import CausalLM
from resmol.run.checkpoint import digest_all, weight_tensors
from resmol.run.directory import RunDir
from resmol.run.ledger import LedgerContent, read_ledger
from resmol.system.atomic_io import remove_directory
from resmol.system.process_setup import keep_freed_memory
from resmol.system.progress import step_progress
from resmol.system.signals import stop_signals_interrupt
from resmol.system.user_paths import default_cache
from resmol.system.wording import counted
from resmol.train.step import TrainState

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.2
Advance = Callable[[int], None]


@dataclass(frozen=True)
class CompleteReplay:
    """How to replay a whole run.

    Attributes:
        inputs: Where the inputs of its data lie, in their order.
        jobs: How many segments to execute at once, each in a process with the recorded number of threads.
        folder: Where the progress is kept; None is a folder of this user, named by the head of the ledger.
        strict: What cannot be judged here is a failure.
    """

    inputs: tuple[str, ...] = ()
    jobs: int = 1
    folder: Path | None = None
    strict: bool = False


def replay_all(run: RunDir, stored: RunConfig, content: LedgerContent, options: CompleteReplay) -> list[Check]:
    """Make a run again and compare, up to the first difference.

    Args:
        run: The run directory.
        stored: Its configuration.
        content: Its ledger, whose chain was verified.
        options: What to read, and how.

    Returns:
        A check for each stage and segment, whose measured text begins with PASS, FAIL or UNSUPPORTED, and one about
        all of it.

    Raises:
        UsageError: ``inputs`` are not those of the run; `DataError`: one of them is not there.
        RunInUse: Another process replays this run.
        Interrupted: A signal arrived.
    """
    source = recorded_or_outcome(run, content.records, stored)
    if isinstance(source, Outcome):
        return [source.check("data", strict=options.strict)]
    parts = segments(run, content.records)
    if not parts:
        return [Outcome("UNSUPPORTED", "there is no step to execute again").check(COMPLETE, strict=options.strict)]
    folder = options.folder or default_cache() / "replays" / content.head[:16]
    started = time.perf_counter()
    checks: list[Check] = []
    with _told_when_stopped(), ReplayProgress.open(folder, content.head) as progress, keep_checkpoints(source, parts):
        for check in _stages(source, options, progress, parts):
            checks.append(check)
            if not check.passed and check.measured.startswith("FAIL"):
                break
        checks.append(_summary(source, parts, checks, time.perf_counter() - started, strict=options.strict))
        if all(check.measured.startswith("PASS") for check in checks):
            progress.finish()
    return checks


@contextmanager
def _told_when_stopped() -> Iterator[None]:
    """Raise `Interrupted` at Ctrl-C and at the other signals that stop a process."""
    try:
        with stop_signals_interrupt():
            yield
    except KeyboardInterrupt as error:
        raise Interrupted(
            "stopped; what passed is kept", fix="run the same command again to go on", signal_number=2
        ) from error


def _stages(
    source: Recorded, options: CompleteReplay, progress: ReplayProgress, parts: list[Segment]
) -> Iterator[Check]:
    """Yield the checks in the order in which the run was made."""
    yield from _text(source, options, progress)
    yield _initial_weights(source).check("initial weights", expected="a function of the seed alone")
    steps = sum(len(part.steps) for part in parts if segment_name(source, part) not in progress.done)
    logger.info(_announcement(source, parts, steps, options.jobs))
    with step_progress("replay", steps) as advance:
        for part, outcome in _executed(source, parts, progress, options.jobs, advance):
            yield outcome.check(f"replay of {part}", strict=options.strict)


def _text(source: Recorded, options: CompleteReplay, progress: ReplayProgress) -> Iterator[Check]:
    datasets = dict(datasets_of(source.data))
    inputs = inputs_by_source(datasets, options.inputs)
    for name, dataset in datasets.items():
        of = f" of {name}" if name else ""
        noted = [f"{part} {dataset.fingerprint}" for part in ("text", "tokens")]
        if all(one in progress.done for one in noted):
            outcomes = [Outcome("PASS", f"{progress.done[one]} (in an earlier call)") for one in noted]
        else:
            logger.info(f"replay: preparing the text{of} again")
            outcomes = [*prepare_again(dataset, source.run, inputs[name], progress.folder / "prepared")]
        for one, outcome in zip(noted, outcomes, strict=True):
            progress.note(one, outcome)
        yield outcomes[0].check(f"raw text{of}", strict=options.strict, expected=TEXT_EXPECTED)
        yield outcomes[1].check(f"tokenisation{of}", strict=options.strict, expected=TOKENS_EXPECTED)


def _initial_weights(source: Recorded) -> Outcome:
    """Draw the initial weights; nothing records them but the first step, which begins with them."""
    config = source.history.at(source.steps[1])
    model = CausalLM.empty(config.model)
    model.init_weights(config.train.seed)
    lines = "".join(f"{name} {value}\n" for name, value in sorted(digest_all(weight_tensors(model)).items()))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    words = f"{total_parameters(config.model):,} numbers drawn with seed {config.train.seed}, sha256 {digest[:16]}"
    return Outcome("PASS", f"{words}; step 1 begins with them")


def _announcement(source: Recorded, parts: list[Segment], steps: int, jobs: int) -> str:
    seconds = sum(record["seconds"] for record in source.steps.values()) * steps / len(source.steps)
    at_once = f", {jobs} at once" if jobs > 1 else ""
    return (
        f"replay: {counted(steps, 'step')} in {counted(len(parts), 'segment')}{at_once}; their training took "
        f"{duration(seconds)} (Ctrl-C keeps what was done; the same command goes on)"
    )


# --- executing segments --------------------------------------------------------------------------------------


def _executed(
    source: Recorded, parts: list[Segment], progress: ReplayProgress, jobs: int, advance: Advance
) -> Iterator[tuple[Segment, Outcome]]:
    """Yield the outcome of each segment in their order; those that passed in an earlier call are not executed."""
    names = {part: segment_name(source, part) for part in parts}
    todo = [part for part in parts if names[part] not in progress.done]
    execute = _in_processes if jobs > 1 and len(todo) > 1 else _in_this_process
    with execute(source, todo, progress, jobs, advance) as result:
        for part in parts:
            yield part, progress.once(names[part], partial(result, part))


@contextmanager
def _in_this_process(
    source: Recorded, _todo: list[Segment], progress: ReplayProgress, _jobs: int, advance: Advance
) -> Iterator[Callable[[Segment], Outcome]]:
    yield lambda part: _one_segment(source, part, progress.states_of(part), advance)


def _one_segment(source: Recorded, part: Segment, states: Path, advance: Advance) -> Outcome:
    """Execute a segment from its beginning, or from where an earlier call left it."""
    keeper = StateKeeper(states)
    begin = keeper.newest()

    def after_step(state: TrainState) -> None:
        keeper.after_step(state)
        advance(1)

    outcome = replay_segment(source, part, begin=begin, on_step=after_step)
    if outcome.verdict == "PASS" and states.exists():
        remove_directory(states)
    return outcome


@contextmanager
def _in_processes(
    source: Recorded, todo: list[Segment], progress: ReplayProgress, jobs: int, advance: Advance
) -> Iterator[Callable[[Segment], Outcome]]:
    """Execute segments in processes of their own, the first ones first; they stop at the next step when this ends."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(jobs, context, _begin_worker) as pool:
        stop, counts = manager.Event(), manager.Queue()
        futures = {
            part: pool.submit(_in_worker, source.run.path, part, progress.states_of(part), stop, counts)
            for part in todo
        }  # fmt: skip
        try:
            yield lambda part: _wait(futures[part], counts, advance)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _wait(future: Future[Outcome], counts: Any, advance: Advance) -> Outcome:
    """Return the outcome of a segment, and count the steps of all processes meanwhile."""
    while True:
        while not counts.empty():
            advance(counts.get())
        try:
            return future.result(TICK_SECONDS)
        except NotYet:
            continue


def _begin_worker() -> None:
    """Let Ctrl-C to the process that started this one, end what both do, and end with it if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_worker(path: Path, part: Segment, states: Path, stop: Any, counts: Any) -> Outcome:
    run = RunDir(path)
    source = Recorded.of(run, read_ledger(run.ledger).records, run.load_config(), verify=False)

    def advance(steps: int) -> None:
        counts.put(steps)
        if stop.is_set():
            raise KeyboardInterrupt

    return _one_segment(source, part, states, advance)


# --- in all --------------------------------------------------------------------------------------------------


def _summary(source: Recorded, parts: list[Segment], checks: list[Check], seconds: float, *, strict: bool) -> Check:
    """Say how much was made again, what that cost, and what was not."""
    expected = "text, tokens, initial weights, every step and every checkpoint, from nothing but the code"
    passed = {check.name for check in checks if check.measured.startswith("PASS")}
    done = [part for part in parts if f"replay of {part}" in passed]
    steps = sum(len(part.steps) for part in done)
    share = seconds / max(1e-9, sum(record["seconds"] for record in source.steps.values()))
    words = (
        f"{steps:,} of {counted(len(source.steps), 'step')}, {counted(len(done), 'segment')}, in {seconds:.0f} s "
        f"({100 * share:.0f} % of the time that the training took)"
    )
    failed = next((check.name for check in checks if check.measured.startswith("FAIL")), None)
    open_ = [check.name for check in checks if check.measured.startswith("UNSUPPORTED")]
    if failed:
        return Check(COMPLETE, False, f"FAIL: the first difference is in: {failed}; {words}", expected, GUARDS)
    if open_:
        return Check(
            COMPLETE, not strict, f"UNSUPPORTED: not judged here: {', '.join(open_)}; {words}", expected, GUARDS
        )
    return Check(COMPLETE, True, f"PASS: {words}", expected, GUARDS)
