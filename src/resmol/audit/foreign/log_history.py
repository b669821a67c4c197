"""The history of a Trainer's run: steps, plan, data and losses, as its states tell them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from resmol.audit.foreign.trainer_files import ForeignRun, Log
from resmol.checks import Check, check_problems
from resmol.system.untrusted_text import listed, quoted
from resmol.system.wording import counted

JUMP = 8.0  # robust standard deviations of the difference between neighboring losses
FEWEST_DIFFERENCES = 8
_ROUNDED = 0.0051  # older versions logged the epoch with two decimals


def checkpoints(run: ForeignRun) -> Check:
    """Check that each checkpoint has a state of the step that its name says."""
    problems = [f"{one.path.name}: {one.problem}" for one in run.checkpoints if one.problem]
    problems += [
        f"{one.path.name} holds the state of step {one.state.global_step}"
        for one in run.checkpoints
        if one.state is not None and one.step not in (None, one.state.global_step)
    ]
    problems += [
        f"{state.name} tells of step {max(log.step for log in state.logs)}, after its own"
        for state in run.states
        if any(log.step > state.global_step for log in state.logs)
    ]
    steps = ", ".join(str(state.global_step) for state in run.states[-4:])
    measured = f"{counted(len(run.checkpoints), 'checkpoint')}, the last states of steps {steps}"
    return check_problems(
        "checkpoints", problems, measured, "each is of the step in its name", "a checkpoint of another run, renamed"
    )


def one_history(run: ForeignRun) -> Check:
    """Check that each state tells everything that the one before it told: the Trainer carries the history on."""
    problems = []
    for before, after in pairwise(run.states):
        told = after.history[: len(before.history)]
        pairs = enumerate(zip(before.history, told, strict=False))
        differing = next((number for number, (old, new) in pairs if not _same(old, new)), None)
        if differing == 0:
            problems.append(f"{after.name} has another history than {before.name} from the first entry on: another run")
        elif differing is not None:
            step = quoted(before.history[differing].get("step"))
            problems.append(f"{before.name} and {after.name} tell different things of step {step}")
        elif len(told) < len(before.history):
            problems.append(f"{after.name} tells less than {before.name}: {len(told)} entries of {len(before.history)}")
    measured = f"{counted(len(run.states), 'state')}, each with the history of the one before"
    guards = "a run that was started anew in the same folder, a history that was edited"
    return check_problems("one history", problems, measured, "each carries on what the one before told", guards)


def _same(old: dict[str, object], new: dict[str, object]) -> bool:
    """Return whether two entries are equal; NaN is equal to itself here."""
    return old == new or repr(sorted(old.items())) == repr(sorted(new.items()))


def steps_logged(run: ForeignRun) -> Check:
    """Check that each step that had to be logged was, once and in order."""
    name, expected, guards = "steps", "each logged once, none missing", "steps lost or repeated at a resume"
    steps = [log.step for log in run.last.logs]
    problems = [f"step {step} is logged {times} times" for step, times in Counter(steps).items() if times > 1]
    problems += [f"step {later} follows step {step}" for step, later in pairwise(steps) if later < step]
    wanted = _due(run, steps)
    missing = sorted(wanted - set(steps))
    met = wanted & set(steps)
    regular = len(met) >= max(len(wanted) / 2, len(set(steps) - wanted))  # else by epoch, or not at all
    if regular and missing:
        problems.append(f"{counted(len(missing), 'step')} missing: {listed([str(step) for step in missing], 5)}")
    rhythm = "" if regular else "; in no regular rhythm, so that missing ones cannot be seen"
    measured = f"{counted(len(steps), 'logged step')} up to {max(steps, default=0)}{rhythm}"
    return check_problems(name, problems, measured, expected, guards)


def _due(run: ForeignRun, steps: list[int]) -> set[int]:
    """Return the steps that had to be logged: multiples of each state's ``logging_steps``, up to that state."""
    due: set[int] = set()
    start = min(steps, default=1) - 1
    for state in run.states:
        every = state.logging_steps or 0
        if every:
            due |= set(range(start + every - start % every, state.global_step + 1, every))
        start = max(start, state.global_step)
    return due


def plan(run: ForeignRun) -> Check:
    """Check that all states have the same plan: the length of the run, and the batch."""
    problems = [
        f"{key} is {before.plan[key]} in {before.name} and {after.plan[key]} in {after.name}"
        for before, after in pairwise(run.states)
        for key in before.plan.keys() & after.plan.keys()
        if before.plan[key] != after.plan[key]
    ]
    measured = ", ".join(f"{key} {value}" for key, value in run.last.plan.items()) or "none is stated"
    guards = "a horizon of the schedule, or a batch, that changes at a resume"
    return check_problems("plan", sorted(problems), measured, "the same in every state", guards)


def data_position(run: ForeignRun) -> Check:
    """Check that the epoch advances evenly with the steps, and that no counter falls: no data repeated or skipped."""
    logs = [log for log in run.last.logs if log.epoch is not None and math.isfinite(log.epoch)]
    problems = [*_uneven(logs), *_falling(run, logs)]
    if len(logs) < 2:
        measured = "the epoch was not logged often enough to compare"
    else:
        per_epoch = _steps_per_epoch(logs)
        tokens = run.last.counters.get("num_input_tokens_seen")
        measured = f"about {per_epoch:.6g} steps an epoch" + (f", {tokens:,.0f} tokens seen" if tokens else "")
    guards = "a resume that begins the data again (ignore_data_skip), or with another data set"
    return check_problems("data position", problems, measured, "the epoch advances evenly with the steps", guards)


def _steps_per_epoch(logs: list[Log]) -> float:
    """Return how many steps an epoch would have if all were whole; infinity where the logs do not say.

    The last step of an epoch may be made of fewer micro-batches: intervals within an epoch decide, if there are any.
    """
    intervals = [_advance(before, after) for before, after in pairwise(logs)]
    slopes = [(borders, advance / steps) for steps, advance, borders in intervals if steps > 0]
    inside = [slope for borders, slope in slopes if not borders] or [slope for _, slope in slopes]
    typical = statistics.median(inside) if inside else 0.0
    return 1 / typical if typical > 0 else math.inf


def _advance(before: Log, after: Log) -> tuple[int, float, int]:
    """Return between two logs: the steps, by how much the epoch advanced, and how many ends of epochs lie there."""
    start, end = before.epoch or 0.0, after.epoch or 0.0
    return after.step - before.step, end - start, max(0, math.floor(end + 1e-9) - math.floor(start + 1e-9))


def _uneven(logs: list[Log]) -> Iterator[str]:
    """Yield where the epoch is not where the steps since the log before lead."""
    per_epoch = _steps_per_epoch(logs[: max(FEWEST_DIFFERENCES, len(logs) // 2)])
    slack = 2 * _ROUNDED * per_epoch if all(round(log.epoch or 0.0, 2) == log.epoch for log in logs) else 0.0
    for before, after in pairwise(logs):
        steps, advance, borders = _advance(before, after)
        off = advance * per_epoch - steps
        if steps > 0 and math.isfinite(per_epoch) and abs(off) > borders + 0.01 * steps + slack:
            kind = "repeated" if off < 0 else "skipped, or another data set"
            yield (
                f"from step {before.step} to {after.step} the epoch goes from {before.epoch:.4g} to {after.epoch:.4g}: "
                f"data of {abs(off):.3g} steps {kind}"
            )
            per_epoch = _steps_per_epoch([log for log in logs if log.step >= after.step])


def _falling(run: ForeignRun, logs: list[Log]) -> Iterator[str]:
    for before, after in pairwise(run.states):
        for key in sorted(before.counters.keys() & after.counters.keys()):
            if after.counters[key] < before.counters[key]:
                yield f"{key} falls from {before.counters[key]:.6g} in {before.name} to {after.counters[key]:.6g}"
    for one, two in pairwise(logs):
        if one.tokens is not None and two.tokens is not None and two.tokens < one.tokens:
            yield f"num_input_tokens_seen falls from {one.tokens:,.0f} to {two.tokens:,.0f} at step {two.step}"


def finite_numbers(run: ForeignRun) -> Check:
    """Check every logged loss, norm and rate."""
    problems = [
        f"step {log.step}: {key} {value}"
        for log in run.last.logs
        for key, value in (("loss", log.loss), ("grad_norm", log.grad_norm), ("learning_rate", log.learning_rate))
        if value is not None and not math.isfinite(value)
    ]
    told = "the Trainer replaces such losses in its log unless it is told not to"  # logging_nan_inf_filter
    measured = f"{counted(len(run.last.logs), 'logged step')}; {told}"
    return check_problems("finite numbers", problems, measured, "no NaN or infinity", "a diverged run")


def losses_at_checkpoints(run: ForeignRun) -> Check:
    """Check that the loss does not jump between the log before a checkpoint and the one after, where resumes begin."""
    name, expected = "loss at checkpoints", f"no rise of more than {JUMP:.0f} robust standard deviations"
    guards = "a resume with other weights, or without the optimizer's state"
    points = [(log.step, log.loss) for log in run.last.logs if log.loss is not None and math.isfinite(log.loss)]
    changes = [later - loss for (_, loss), (_, later) in pairwise(points)]
    if len(changes) < FEWEST_DIFFERENCES:
        return Check(name, True, f"not compared: {counted(len(points), 'finite loss')} logged", expected, guards)
    middle = statistics.median(changes)
    spread = 1.4826 * statistics.median(abs(change - middle) for change in changes)
    level = abs(statistics.median(loss for _, loss in points))
    least = max(JUMP * spread, 1e-3 * level)  # the second for a history without noise
    at = [state for state in run.states[:-1] if state.global_step < points[-1][0]]
    problems = [
        f"after {state.name} the loss rises from {loss:.4g} (step {step}) to {later_loss:.4g} (step {later})"
        for state in at
        for (step, loss), (later, later_loss) in pairwise(points)
        if step <= state.global_step < later and later_loss - loss - middle > least
    ]
    measured = f"no jump at {counted(len(at), 'checkpoint')}; it changes by {spread:.2g} from log to log"
    return check_problems(name, problems, measured, expected, guards)


def not_read(run: ForeignRun) -> Check:
    """Say what an audit cannot look into: pickles, which run code when they are read."""
    names = sorted({name for one in run.checkpoints for name in one.pickles})
    lacking = [one.path.name for one in run.checkpoints if "optimizer.pt" not in one.pickles]
    anew = f"; {listed(lacking, 3)} without optimizer.pt, from which a resume starts it anew" if lacking else ""
    measured = (
        f"{listed(names, 6) or 'no pickles'}: the state of optimizer, schedule and random numbers is not judged{anew}"
    )
    return Check("not read", True, measured, "nothing is unpickled")
