"""Rows K1, K4, K6, K7, K8: a process that is killed, at any time and again and again."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from campaign import Campaign
from trials import INTERVAL, STEPS, Forks, Oracle, Setting, checkpoint_digests, step_bits, train_run
from waiting import HANGS

import resmol.run.async_save
import resmol.run.checkpoint
import resmol.train.loop
import resmol.train.step
from resmol.data.shards import Dataset
from resmol.run.checkpoint import StagedCheckpoint
from resmol.run.checkpoint_manifest import list_checkpoints, step_of
from resmol.run.directory import RunDir
from resmol.run.ledger import read_ledger, select
from resmol.run.ranks import Ranks


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
        code = forks.run(train_run, run, setting)
        differences = oracle.differences(run) if code == 0 else [f"exit code {code}"]
        differences += lost_too_much(run)
        problems += [f"trial {trial}: {text}" for text in differences[:1]]
        lost = max(lost, *executed_again(run))
    campaign.record(
        "K1", "SIGKILL at a random time", "the same bits after a restart", problems, count,
        note=f"at most {lost} steps executed again of {STEPS}",
    )  # fmt: skip


def executed_again(run: Path) -> list[int]:
    """Return how many steps each rewind of a run took back, and 0."""
    rewinds = select(read_ledger(RunDir(run).ledger).records, "rewind")
    return [0, *(record["from_step"] - record["to_step"] for record in rewinds)]


def lost_too_much(run: Path) -> list[str]:
    """A crash may take the steps since a checkpoint, and those that were executed while the next was on its way."""
    lost = max(executed_again(run))
    return [] if lost <= 2 * INTERVAL else [f"{lost} steps were executed again"]


# What the thread that saves does, and of which step's save it is: before anything is synced, when all is but the name,
# when the checkpoint is recorded.
IN_THE_BACKGROUND: dict[str, tuple[Any, Callable[..., int]]] = {
    "commit_checkpoint": (resmol.run.async_save, lambda staged, _: staged.manifest.step),
    "rename": (os, lambda _, final: step_of(final) if final.name.startswith("step-") else 0),
    "prune": (resmol.run.async_save, lambda folder, *_: step_of(list_checkpoints(folder)[0])),
}


def die_in_the_background(step: int, stage: str, ahead: int, run: Path, setting: Setting) -> int:
    """Train; be killed at a stage of the save of a step, by the thread that saves, ``ahead`` steps later."""
    module, saved_step = IN_THE_BACKGROUND[stage]
    real, real_record, recorded, changed = (
        getattr(module, stage),
        resmol.train.loop.record_step,
        [0],
        threading.Condition(),
    )

    def record(session: Any, result: Any, seconds: float) -> None:
        real_record(session, result, seconds)
        with changed:
            recorded[:] = [result.step]
            changed.notify_all()

    def die(*arguments: Any) -> Any:
        if saved_step(*arguments) == step:
            with changed:
                changed.wait_for(lambda: recorded[0] >= step + ahead, timeout=HANGS / 3)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    resmol.train.loop.record_step = record
    setattr(module, stage, die)
    return train_run(run, setting)


def test_k1_killed_while_a_save_is_on_its_way(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """Training is steps ahead of a save when the process dies in it: those steps must come again with their bits."""
    cases = [(stage, ahead) for stage in IN_THE_BACKGROUND for ahead in range(1, INTERVAL)]
    chosen = cases if campaign.full else campaign.draw("K1b").sample(cases, 3)
    problems = []
    for number, (stage, ahead) in enumerate(chosen):
        run, step = tmp_path / f"run-{number}", INTERVAL * (2 + number % 10)
        code = forks.run(die_in_the_background, step, stage, ahead, run, setting)
        found = [] if code == -signal.SIGKILL else [f"exit code {code}"]
        code = forks.run(train_run, run, setting)
        found += oracle.differences(run) if code == 0 else [f"exit code {code}"]
        found += [] if max(step_bits(run)) == STEPS else ["the run is not complete"]
        newest = step if stage == "prune" else step - INTERVAL  # until it has its name, the one before is the newest
        if max(executed_again(run)) < step + ahead - newest:
            found.append(f"{executed_again(run)} steps were executed again after dying {ahead} steps ahead")
        found += lost_too_much(run)
        problems += [f"{stage}, {ahead} steps ahead: {text}" for text in found[:1]]
    campaign.record(
        "K1b", "SIGKILL while a save becomes durable, training being steps ahead",
        "the checkpoint before; the steps after it again with their bits", problems, len(chosen),
        exhaustive=campaign.full,
    )  # fmt: skip


def resumes(run: Path) -> int:
    """Count the resumptions that a run's ledger has recorded."""
    ledger = RunDir(run).ledger
    return len(list(select(read_ledger(ledger).records, "resume"))) if ledger.exists() else 0


def test_k4_killed_while_recovering(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """Killed somewhere, then three times within the first moments of coming back."""
    count, draw = campaign.count(4, 50), campaign.draw("K4")
    started = time.perf_counter()
    assert forks.run(train_run, tmp_path / "whole", setting) == 0
    duration = time.perf_counter() - started
    started = time.perf_counter()
    assert forks.run(train_run, tmp_path / "whole", setting) == 0  # there is nothing left to train
    recovery = time.perf_counter() - started
    problems, before_resumed, kills = [], 0, 0
    for trial in range(count):
        run = tmp_path / f"run-{trial}"
        for level in range(4):
            known = resumes(run)
            child = forks.start(train_run, run, setting)
            time.sleep(draw.uniform(0, 1.5 * recovery if level else duration))
            child.kill()
            child.join()
            kills += level > 0
            before_resumed += level > 0 and resumes(run) == known
        code = forks.run(train_run, run, setting)
        differences = oracle.differences(run) if code == 0 else [f"exit code {code}"]
        differences += [] if max(step_bits(run)) == STEPS else ["the run is not complete"]
        problems += [f"trial {trial}: {text}" for text in differences[:1]]
    campaign.record(
        "K4", "killed again while recovering, three times in a row", "the same bits at the end", problems, count,
        note=f"{before_resumed} of {kills} kills came before the resumption was recorded",
    )  # fmt: skip


# --- epochs: a run whose data are used up several times ---------------------------------------------------------


class Epochs:
    """A run on little data, in which a whole number of steps is an epoch and every epoch ends at a checkpoint."""

    def __init__(self, setting: Setting, data: Dataset) -> None:
        """Choose the length of a window so that it comes out even."""
        tokens = len(data.train)
        self.windows, length = next(
            (windows, length)
            for windows in (2 * INTERVAL, 4 * INTERVAL, 6 * INTERVAL)
            for length in range(16, 65)
            if -(-(tokens - 1) // length) == windows
        )
        self.steps = self.windows // 2  # of an epoch: two windows a step
        self.setting = Setting(setting.config, data.root, setting.tokenizer)
        self.overrides = (f"data.seq_len={length}", f"batch.global_batch_tokens={2 * length}")


@pytest.fixture(scope="module")
def epochs(setting: Setting, short_dataset: Dataset) -> Epochs:
    """A run on little data."""
    return Epochs(setting, short_dataset)


@pytest.fixture(scope="module")
def epochs_oracle(forks: Forks, epochs: Epochs, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """That run, undisturbed."""
    run = tmp_path_factory.mktemp("epochs") / "run"
    every_step = ("checkpoint.every=1", "checkpoint.keep_last=1000")
    assert forks.run(train_run, run, epochs.setting, *epochs.overrides, *every_step) == 0
    return Oracle(step_bits(run), checkpoint_digests(run))


def die_after_saving(step: int, run: Path, setting: Setting, *overrides: str) -> int:
    """Train, and be killed the moment the checkpoint of a step is committed, before anything else is noted."""
    real, real_save = resmol.run.async_save.commit_checkpoint, resmol.train.loop.save

    def commit_and_die(staged: StagedCheckpoint, ranks: Ranks) -> Any:
        manifest = real(staged, ranks)
        if manifest.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return manifest

    resmol.run.async_save.commit_checkpoint = commit_and_die
    resmol.train.loop.save = lambda *arguments, **options: real_save(*arguments, **{**options, "wait": True})
    return train_run(run, setting, *overrides)


def test_k6_boundaries(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, epochs: Epochs, epochs_oracle: Oracle,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Stops at chosen steps, each in a process of its own; the small form of 5000, 5001, 5050."""
    end = epochs.steps
    plain, short = ((), setting, oracle), (epochs.overrides, epochs.setting, epochs_oracle)
    assert end % INTERVAL == 0
    assert 2 * end < STEPS
    cases: dict[str, tuple[tuple[int, ...], tuple[tuple[str, ...], Setting, Oracle]]] = {
        "checkpoint, one step, ten steps": ((50, 51, 60), plain),
        "the first checkpoint": ((INTERVAL, INTERVAL + 1, 60), plain),
        "last steps that are no checkpoint otherwise": ((52, 53, 60), plain),
        "finished, and started again": ((60, 60), plain),
        "checkpoint at the end of an epoch": ((end, end + 1, 60), short),
        "one step before the end of an epoch": ((end - 1, end, 60), short),
        "the second end of an epoch": ((2 * end, 2 * end + 1, 60), short),
        "killed as the checkpoint at the end of an epoch is committed": ((-end, 60), short),
    }
    problems = []
    for name, (stops, (overrides, chosen, expected)) in cases.items():
        run = tmp_path / name.replace(" ", "-")
        for number, stop in enumerate(stops):
            if stop < 0:
                code = forks.run(die_after_saving, -stop, run, chosen, *overrides)
                wanted, stop = -signal.SIGKILL, -stop
            else:
                code, wanted = forks.run(train_run, run, chosen, *overrides, f"train.steps={stop}"), 0
            bits = step_bits(run)
            found = [] if code == wanted else [f"exit code {code}"]
            found += [] if sorted(bits) == list(range(1, stop + 1)) else [f"steps {sorted(bits)[-3:]} after {stop}"]
            found += expected.differences(run)
            gone_on = len(set(stops[: number + 1])) - 1  # a finished run that is started again has nothing to record
            if number and resumes(run) != gone_on:
                found.append(f"{resumes(run)} resumptions recorded after {gone_on}")
            executed = Counter(record["step"] for record in select(read_ledger(RunDir(run).ledger).records, "step"))
            found += [f"step {step} was executed {times} times" for step, times in executed.items() if times > 1]
            problems += [f"{name}, to {stop}: {text}" for text in found[:1]]
    campaign.record(
        "K6", "stops and starts at boundaries: 50, 51, 60; the end of an epoch; the last step",
        "every step once, with its own batch and learning rate", problems, len(cases), exhaustive=True,
    )  # fmt: skip


def die_after_step(step: int, trace: Path, run: Path, setting: Setting, *overrides: str) -> int:
    """Train; write down which windows the model is given; be killed after a step (never, where it is 0)."""
    real_step, real_record = resmol.train.step.train_step, resmol.train.loop.record_step

    def trace_step(state: Any, step_batch: Any, *arguments: Any) -> Any:
        ids = " ".join(str(window) for batch in step_batch.batches for window in batch.window_ids)
        with trace.open("a") as file:
            file.write(f"{state.step + 1} {ids}\n")
        return real_step(state, step_batch, *arguments)

    def record_and_die(session: Any, result: Any, seconds: float) -> None:
        real_record(session, result, seconds)
        if result.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    resmol.train.step.train_step, resmol.train.loop.record_step = trace_step, record_and_die
    return train_run(run, setting, *overrides)


def wrong_samples(trace: Path, epochs: Epochs) -> list[str]:
    """Look at which windows the model was given, all in all: each once an epoch, whatever was executed twice."""
    given: dict[int, tuple[int, ...]] = {}
    problems = []
    for line in trace.read_text().splitlines():
        step, *windows = (int(word) for word in line.split())
        if given.setdefault(step, tuple(windows)) != tuple(windows):
            problems.append(f"step {step} was given {windows}, the first time {given[step]}")
    if sorted(given) != list(range(1, STEPS + 1)):
        problems.append(f"{len(given)} steps instead of {STEPS}")
    for first in range(1, STEPS - epochs.steps + 2, epochs.steps):
        seen = Counter(window for step in range(first, first + epochs.steps) for window in given.get(step, ()))
        if seen != Counter(range(epochs.windows)):
            problems.append(f"the epoch of steps {first} to {first + epochs.steps - 1} was not given each window once")
    return problems


def test_k7_killed_after_every_step(
    campaign: Campaign, forks: Forks, epochs: Epochs, epochs_oracle: Oracle, tmp_path: Path
) -> None:
    """Killed after a step and again a little later in the same epoch; no sample is repeated, none is left out."""
    steps = range(1, STEPS + 1) if campaign.full else sorted(campaign.draw("K7").sample(range(1, STEPS + 1), 4))
    problems = []
    for step in steps:
        run, trace = tmp_path / f"run-{step}", tmp_path / f"trace-{step}"
        for kill_at in (step, min(step + 2, STEPS), 0):
            code = forks.run(die_after_step, kill_at, trace, run, epochs.setting, *epochs.overrides)
            if code != (-signal.SIGKILL if kill_at else 0):
                problems.append(f"killed after step {kill_at}: exit code {code}")
        found = wrong_samples(trace, epochs) + epochs_oracle.differences(run)
        problems += [f"killed after step {step}: {text}" for text in found[:1]]
    campaign.record(
        "K7", "killed after a step, and again two steps later", "each sample once an epoch, the same bits", problems,
        len(steps), exhaustive=campaign.full, note=f"an epoch has {epochs.steps} steps",
    )  # fmt: skip


# --- memory -------------------------------------------------------------------------------------------------------


STAGES = {
    "layout": resmol.run.checkpoint,
    "stage_directory": resmol.run.checkpoint,
    "write_shard": resmol.run.checkpoint,
    "file_sha256": resmol.run.checkpoint,
    "commit_staged": resmol.run.checkpoint,
    "prune": resmol.run.async_save,
}


def save_without_memory(step: int, stage: str, spare: int, run: Path, setting: Setting) -> int:
    """Train; from a stage of the save of a step on there are only about ``spare`` bytes of memory."""
    real_save, real_stage = resmol.train.loop.save, getattr(STAGES[stage], stage)
    saving, hoard = [], []

    def save(state: Any, session: Any, **options: Any) -> None:
        saving[:] = [state.step]
        real_save(state, session, **options)
        session.checkpointer.wait_until_finished()
        hoard.clear()
        signal.alarm(0)

    def starved(*arguments: Any, **options: Any) -> Any:
        if saving == [step] and not hoard:
            hoard.extend(starve(spare))
        return real_stage(*arguments, **options)

    resmol.train.loop.save = save
    setattr(STAGES[stage], stage, starved)
    return train_run(run, setting)


def starve(spare: int) -> list[bytes]:
    """Let the kernel give no more, then take what the heap has left, but for ``spare`` bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    signal.alarm(1)  # a thread that cannot even start leaves Python waiting for it: then the process is killed
    hoard = []
    for block in (1_000_000, 30_000, 2_000):
        try:
            while True:
                hoard.append(bytes(block))
        except MemoryError:
            continue
    while spare > 0 and hoard:
        spare -= len(hoard.pop())
    return hoard


def test_k8_out_of_memory_during_a_save(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """Memory runs out somewhere in a save; the process fails or is killed, and the next one goes on."""
    count, draw = campaign.count(5, 20), campaign.draw("K8")
    problems, codes = [], Counter[int]()
    for trial in range(count):
        run, step = tmp_path / f"run-{trial}", INTERVAL * draw.randint(1, STEPS // INTERVAL)
        stage = list(STAGES)[trial % len(STAGES)]
        code = forks.run(save_without_memory, step, stage, spare_bytes(draw), run, setting)
        codes[code] += 1
        code = forks.run(train_run, run, setting)
        found = oracle.differences(run) if code == 0 else [f"exit code {code}"]
        found += [] if max(step_bits(run)) == STEPS else ["the run is not complete"]
        problems += [f"trial {trial}: {text}" for text in found[:1]]
    assert codes[0] < count, "memory never ran out"
    campaign.record(
        "K8", "out of memory during a save", "the same bits after a restart", problems, count,
        note="exit codes of the starved: " + ", ".join(f"{code} ({times})" for code, times in sorted(codes.items())),
    )  # fmt: skip


def spare_bytes(draw: Random) -> int:
    """From next to nothing to a fair amount, each order of magnitude as likely."""
    return int(10 ** draw.uniform(3, 5.5))
