"""Rows W1 to W5: two ranks train one run, and one of them dies, freezes, is slow, or works on something else.

The processes are children of the fork server that think torchrun had started them; their store is in the test. What
torchrun does when one of its processes ends with an error, ending the others, is tried once, with the real one.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from campaign import Campaign
from test_parallel import torchrun_words
from test_processes import goes_on, reached, records_of, set_all
from trials import (
    INTERVAL,
    STEPS,
    Forks,
    Oracle,
    Setting,
    checkpoint_digests,
    command,
    command_arguments,
    error_of,
    finish,
    run_command_line,
    step_bits,
    train_run,
)
from waiting import HANGS

import resmol.system.launcher
import resmol.train.loop
import resmol.train.start
import resmol.train.step
from resmol.errors import CheckpointError
from resmol.run.ledger import Record, effective_steps, select
from resmol.run.tensor_shards import shard_of

PATIENCE = 60  # runtime.collective_timeout, where nothing needs to wait for it
TWO_MICRO_BATCHES = ["--set", "batch.micro_batch_size=1"]  # one for each of two processes
FOUR_MICRO_BATCHES = [*TWO_MICRO_BATCHES, "--set", "batch.global_batch_tokens=128"]
LOST = r"rank (\d) died or froze \(last phase: (.*)\)"


@pytest.fixture(scope="module")
def shared_oracle(forks: Forks, setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """The run of one process, with two micro-batches a step, that nothing happens to."""
    run = tmp_path_factory.mktemp("shared-oracle") / "run"
    overrides = ("batch.micro_batch_size=1", "checkpoint.every=1", "checkpoint.keep_last=1000")
    assert forks.run(train_run, run, setting, *overrides) == 0
    return Oracle(step_bits(run), checkpoint_digests(run))


def be_process(rank: int, world_size: int, port: int, fault: str, run: Path, setting: Setting, *arguments: str) -> int:
    """Do what `resmol train RUN` does as one of several processes, with a fault in this one."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    resmol.system.launcher.RANK_0_SECONDS = 0.0  # nobody ends this rank while it waits
    FAULTS.get(fault, lambda: None)()
    with error_file(run, rank).open("w", buffering=1, encoding="utf-8") as file, redirect_stderr(file):
        words = ["train", str(run), *command_arguments(setting), *TWO_MICRO_BATCHES, *arguments]
        return run_command_line(words, debug=False)


def error_file(run: Path, rank: int) -> Path:
    return run.parent / f"{run.name}.{rank}.error"


@contextmanager
def processes(
    forks: Forks, run: Path, setting: Setting, *arguments: str, faults: tuple[str, ...] = ("", "")
) -> Iterator[list[BaseProcess]]:
    """Start the processes of one run, one for each of ``faults``; none of them is left."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = [
        forks.start(be_process, rank, len(faults), store.port, fault, run, setting, *arguments)
        for rank, fault in enumerate(faults)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


def wait_for_step(run: Path, step: int, started: list[BaseProcess]) -> None:
    """Wait until a step is recorded, or a process ended."""
    until = time.monotonic() + HANGS
    while reached(run) < step and all(process.is_alive() for process in started):
        assert time.monotonic() < until, f"step {step} was not reached"
        time.sleep(0.002)


# --- faults in one process ---------------------------------------------------------------------------------------


def be_slow() -> None:
    real = resmol.train.step.accumulate_gradients

    def slowly(*values: Any) -> Any:
        time.sleep(1.0)
        return real(*values)

    resmol.train.step.accumulate_gradients = slowly


def have_other_weights() -> None:
    after_the_start(lambda state: shard_of(state.model.model.norm.weight.data).local[3].add_(1e-6))


def have_another_step() -> None:
    after_the_start(lambda state: setattr(state, "step", state.step + 1))


def after_the_start(change: Callable[[Any], object]) -> None:
    """Change the state of this rank when it is where the run stands."""
    real = resmol.train.start.resume_or_start

    def start_and_change(state: Any, *arguments: Any, **options: Any) -> Any:
        checkpoint = real(state, *arguments, **options)
        change(state)
        return checkpoint

    resmol.train.start.resume_or_start = start_and_change


def have_other_data() -> None:
    real = resmol.train.start.open_run_data

    def open_other(*arguments: Any) -> Any:
        dataset, tokenizer = real(*arguments)
        object.__setattr__(dataset, "fingerprint", "0" * 64)
        return dataset, tokenizer

    resmol.train.start.open_run_data = open_other


def have_another_learning_rate() -> None:
    real = resmol.train.start.resolve_auto

    def resolve_otherwise(config: Any) -> Any:
        resolved, choices = real(config)
        return resolved.replace({"optimizer.lr": 0.02}), choices

    resmol.train.start.resolve_auto = resolve_otherwise


FAULTS = {
    "slow": be_slow,
    "weights": have_other_weights,
    "step": have_another_step,
    "data fingerprint": have_other_data,
    "configuration": have_another_learning_rate,
}


# --- the rows ----------------------------------------------------------------------------------------------------


def lost(run: Path, survivor: int, code: int, seconds: float, limit: float) -> list[str]:
    """Look at the rank that lost the other: its exit code, which rank it names, and how long it took."""
    text = error_file(run, survivor).read_text(encoding="utf-8")
    found = [] if code == 1 else [f"exit code {code}: {text.strip()}"]
    named = re.search(LOST, text)
    if named is None or named[1] != str(1 - survivor):
        found.append(f"rank {1 - survivor} is not named: {text.strip()}")
    return found + ([] if seconds <= limit else [f"noticed after {seconds:.1f} s"])


def lose(
    how: signal.Signals, forks: Forks, run: Path, setting: Setting, rank: int, step: int, timeout: int, limit: float
) -> tuple[list[str], float] | None:
    """Send a signal to one of two processes after a step; None where the run came to its end before."""
    with processes(forks, run, setting, *set_all(f"runtime.collective_timeout={timeout}")) as started:
        wait_for_step(run, step, started)
        os.kill(started[rank].pid or 0, how)
        at = time.monotonic()
        code = finish(started[1 - rank])
        seconds = time.monotonic() - at
        if code == 0:
            return None
        found = lost(run, 1 - rank, code, seconds, limit)
        if rank == 1 and not any(w["what"] == "a collective failed" for w in select(records_of(run), "warn")):
            found.append("the ledger does not record it")
        return found, seconds


def lose_and_go_on(
    how: signal.Signals, forks: Forks, setting: Setting, oracle: Oracle, folder: Path, count: int, draw: random.Random,
    timeout: int, limit: float,
) -> tuple[list[str], str]:  # fmt: skip
    """Lose one of two processes after a random step, ``count`` times, and go on each time; the problems, and a note."""
    problems, slowest, finished = [], 0.0, 0
    for trial in range(count):
        run = folder / f"run-{trial}"
        step = draw.randrange(1, STEPS - INTERVAL)
        outcome = lose(how, forks, run, setting, trial % 2, step, timeout, limit)
        found, seconds = outcome or ([], 0.0)
        slowest, finished = max(slowest, seconds), finished + (outcome is None)
        found += goes_on(forks, run, setting, oracle, *TWO_MICRO_BATCHES)
        problems += [f"trial {trial}: {'; '.join(found)}"] if found else []
    assert finished < count
    return problems, f"at most {slowest:.1f} s; {finished} had come to the end"


def test_w1_one_of_two_is_killed(
    campaign: Campaign, forks: Forks, setting: Setting, shared_oracle: Oracle, tmp_path: Path
) -> None:
    """SIGKILL for one of two processes after a random step; the other ends, and the run goes on."""
    count, draw = campaign.count(2, 40), campaign.draw("W1")
    limit = 30 if campaign.full else 150  # the suite shares its machine
    problems, note = lose_and_go_on(
        signal.SIGKILL, forks, setting, shared_oracle, tmp_path, count, draw, PATIENCE, limit
    )
    campaign.record(
        "W1", "one of two processes is killed after a random step",
        f"the other names it and ends within {limit} s; the same bits after a restart", problems, count, note=note,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row", "how", "event"),
    [("W1s", signal.SIGKILL, "is killed"), ("W2f", signal.SIGSTOP, "freezes (SIGSTOP)")],
)
def test_one_of_several_is_lost_with_either_strategy(
    campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path, row: str, how: signal.Signals, event: str
) -> None:
    """Any rank of 2 or 4 that hold the weights or share them; with as many again, the same bits."""
    draw, problems, trials = campaign.draw(row), [], 0
    groups = [(2, "fsdp"), (4, "ddp"), (4, "fsdp")]
    for world_size, strategy in groups if campaign.full else groups[:1]:
        patience = PATIENCE if how is signal.SIGKILL else campaign.count(10, 5)  # the suite shares its machine
        words = [*FOUR_MICRO_BATCHES, "--set", f"parallel.strategy={strategy}"]
        words += set_all(f"runtime.collective_timeout={patience}")
        straight, ranks = tmp_path / f"straight-{strategy}-{world_size}", ("",) * world_size
        with processes(forks, straight, setting, *words, faults=ranks) as started:
            assert [finish(process) for process in started] == [0] * world_size
        for trial in range(campaign.count(1, 10)):
            trials += 1
            run, victim = tmp_path / f"{strategy}-{world_size}-{trial}", trial % world_size
            with processes(forks, run, setting, *words, faults=ranks) as started:
                wait_for_step(run, draw.randrange(1, STEPS - INTERVAL), started)
                os.kill(started[victim].pid or 0, how)
                codes = {finish(process) for rank, process in enumerate(started) if rank != victim}
            with processes(forks, run, setting, *words, faults=ranks) as started:
                again = {finish(process) for process in started}
            same = step_bits(run) == step_bits(straight) and newest_digests(run) == newest_digests(straight)
            if codes != {1} or again != {0} or not same:
                problems.append(f"{strategy}, rank {victim} of {world_size}: {codes}, {again}, same bits: {same}")
    campaign.record(
        row, f"any of 2 or 4 ranks, which hold the weights or share them, {event} after a random step",
        "the others end; the bits of a run that nothing happened to, with as many ranks again", problems, trials,
    )  # fmt: skip


def newest_digests(run: Path) -> dict[str, str]:
    """Return the sha256 of each tensor of the last checkpoint."""
    digests = checkpoint_digests(run)
    return digests[max(digests)]


def test_w2_one_of_two_freezes(
    campaign: Campaign, forks: Forks, setting: Setting, shared_oracle: Oracle, tmp_path: Path
) -> None:
    """SIGSTOP for one of two processes after a random step; the other notices and names it."""
    count, draw = campaign.count(2, 10), campaign.draw("W2")
    timeout, more = (2, 5) if campaign.full else (10, 150)  # the suite shares its machine
    problems, note = lose_and_go_on(
        signal.SIGSTOP, forks, setting, shared_oracle, tmp_path, count, draw, timeout, timeout + more
    )
    campaign.record(
        "W2", "one of two processes freezes (SIGSTOP) after a random step",
        f"the other names it and ends within {timeout} + {more} s; the same bits after a restart",
        problems, count, note=note,
    )  # fmt: skip


def test_w2s_one_of_two_is_slow(
    campaign: Campaign, forks: Forks, setting: Setting, shared_oracle: Oracle, tmp_path: Path
) -> None:
    """A rank ten times as slow as the other is recorded as a straggler, and nothing else changes."""
    problems = []
    for rank in (0, 1):
        run = tmp_path / f"run-{rank}"
        with processes(
            forks, run, setting, "--steps", "10", faults=("slow" * (rank == 0), "slow" * (rank == 1))
        ) as two:
            codes = [finish(process) for process in two]
        reasons = [str(w["reason"]) for w in select(records_of(run), "warn") if w["what"] == "straggler"]
        found = [] if codes == [0, 0] else [f"exit codes {codes}"]
        found += [] if [reason[:6] for reason in reasons] == [f"rank {rank}"] else [f"recorded: {reasons}"]
        found += shared_oracle.differences(run)
        problems += [f"process {rank}: {'; '.join(found)}"] if found else []
    campaign.record(
        "W2s", "one of two processes is ten times as slow", "it is named in the ledger; the same bits", problems, 2,
        exhaustive=True,
    )  # fmt: skip


def test_w3_other_numbers_of_processes(
    campaign: Campaign, forks: Forks, setting: Setting, shared_oracle: Oracle, tmp_path: Path
) -> None:
    """A run goes from one process to two and back at random steps."""
    count, draw, problems = campaign.count(1, 10), campaign.draw("W3"), []
    for trial in range(count):
        run, both = tmp_path / f"run-{trial}", bool(trial % 2)
        for stop in [*sorted(draw.sample(range(1, STEPS), 2)), STEPS]:
            wish = ("--steps", str(stop))
            if both:
                with processes(forks, run, setting, *wish) as started:
                    codes = [finish(process) for process in started]
            else:
                codes = [forks.run(command, run, setting, *TWO_MICRO_BATCHES, *wish)]
            problems += [f"trial {trial}, to step {stop}: exit codes {codes}"] if any(codes) else []
            both = not both
        problems += [f"trial {trial}: {found}" for found in shared_oracle.differences(run)]
    campaign.record(
        "W3", "1, 2, 1 or 2, 1, 2 processes, at random steps", "the bits of one process", problems, count
    )  # fmt: skip


def test_w3_other_numbers_of_processes_and_the_other_strategy(
    campaign: Campaign, forks: Forks, setting: Setting, shared_oracle: Oracle, tmp_path: Path
) -> None:
    """A run goes on with 1, 2 or 4 ranks that hold all of the weights or share them, each time from the checkpoint."""
    count, draw, problems = campaign.count(1, 10), campaign.draw("W3s"), []
    groups = [(1, "ddp"), (4, "fsdp"), (2, "fsdp"), (2, "ddp"), (4, "ddp"), (1, "ddp")]
    for trial in range(count):
        run, straight = tmp_path / f"run-{trial}", tmp_path / f"straight-{trial}"
        groups = groups if trial == 0 else draw.sample(groups, len(groups))
        stops = [*sorted(draw.sample(range(1, STEPS if campaign.full else 12), len(groups) - 1))]
        stops.append(stops[-1] + 3)
        for stop, (world_size, strategy) in zip(stops, groups, strict=True):
            words = (*FOUR_MICRO_BATCHES, "--set", f"parallel.strategy={strategy}", "--steps", str(stop))
            if world_size == 1:
                codes = [forks.run(command, run, setting, *FOUR_MICRO_BATCHES, "--steps", str(stop))]
            else:
                with processes(forks, run, setting, *words, faults=("",) * world_size) as started:
                    codes = [finish(process) for process in started]
            problems += [f"trial {trial}, {strategy} {world_size} to {stop}: exit codes {codes}"] if any(codes) else []
        assert forks.run(command, straight, setting, *FOUR_MICRO_BATCHES, "--steps", str(stops[-1])) == 0
        problems += [f"trial {trial}: {text}" for text in far_from(records_of(straight), records_of(run))]
    campaign.record(
        "W3s", "1, 2 or 4 ranks, which hold the weights or share them, in turn", "the windows of one process, and its "
        "losses within the rounding of sums", problems, count,
    )  # fmt: skip


def far_from(straight: list[Record], found: list[Record]) -> list[str]:
    """Compare the steps of two runs: the windows must be equal, the losses nearly so."""
    expected, steps = effective_steps(straight), effective_steps(found)
    wrong = [step for step in expected if step not in steps or steps[step]["windows"] != expected[step]["windows"]]
    far = [step for step in expected if step in steps and abs(steps[step]["loss"] / expected[step]["loss"] - 1) > 1e-4]
    return ([f"other windows in the steps {wrong}"] if wrong else []) + ([f"other losses in {far}"] if far else [])


def test_w4_processes_that_work_on_different_things(
    campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path
) -> None:
    """One of several has other weights, another step, other data or another configuration: nothing begins.

    Ranks that share the weights know what these must be from the checkpoint that they have read.
    """
    groups, problems, trials = [(2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")], [], 0
    for world_size, strategy in groups if campaign.full else groups[:2]:
        words = [*FOUR_MICRO_BATCHES, "--set", f"parallel.strategy={strategy}"]
        for what, rank in itertools.product([name for name in FAULTS if name != "slow"], range(world_size)):
            if not campaign.full and rank != len(what) % 2:
                continue
            trials += 1
            run, shared = tmp_path / f"{what}-{rank}-{strategy}-{world_size}", (what, strategy) == ("weights", "fsdp")
            if shared:
                with processes(forks, run, setting, *words, "--steps", "5", faults=("",) * world_size) as started:
                    assert [finish(process) for process in started] == [0] * world_size
            faults = tuple(what * (one == rank) for one in range(world_size))
            with processes(forks, run, setting, *words, faults=faults) as started:
                codes = {finish(process) for process in started}
            texts = [error_file(run, one).read_text(encoding="utf-8") for one in range(world_size)]
            expected = rf"rank {rank or '[1-3]'} has a different {what} from rank 0"
            expected = "other weights or moments than the ranks have read from it" if shared else expected
            found = [] if codes == {CheckpointError.exit_code if shared else 2} else [f"exit codes {codes}: {texts}"]
            found += [text for text in texts if not re.search(expected, text)]
            found += [f"step {reached(run)} was executed"] if reached(run) != 5 * shared else []
            problems += [f"{what} of rank {rank} of {world_size}, {strategy}: {'; '.join(found)}"] if found else []
    campaign.record(
        "W4", "one of 2 or 4 ranks, which hold the weights or share them, has other weights, another step, other data "
        "or another configuration", "all end with exit code 2 before the first step, or 65 for a checkpoint, and say "
        "what differs", problems, trials, exhaustive=campaign.full,
    )  # fmt: skip


def test_torchrun_ends_what_is_left(forks: Forks, setting: Setting, shared_oracle: Oracle, tmp_path: Path) -> None:
    """With the real torchrun: a frozen process is named, ended with the others, and the run goes on."""
    run = tmp_path / "run"
    words = ["--steps", "100000", *set_all("runtime.collective_timeout=10")]
    code, said, frozen = torchrun_and_signal(signal.SIGSTOP, run, setting, *words)
    assert code != 0
    assert re.search(LOST, said), said[-2000:]
    with pytest.raises(ProcessLookupError):
        os.kill(frozen, 0)
    last = reached(run)
    assert forks.run(command, run, setting, *TWO_MICRO_BATCHES, "--steps", str(last)) == 0
    bits = step_bits(run)
    assert list(bits) == list(range(1, last + 1))
    assert [bits[step] for step in bits if step <= STEPS] == list(shared_oracle.steps.values())[:last]


def test_torchrun_starts_the_ranks_again(setting: Setting, shared_oracle: Oracle, tmp_path: Path) -> None:
    """With --max-restarts, a run whose rank 1 was killed comes to its end by itself; it has the bits of a whole one.

    The ranks of the second start find torchrun's store as the first ones left it.
    """
    run, steps = tmp_path / "run", 2 * STEPS
    code, said, _ = torchrun_and_signal(signal.SIGKILL, run, setting, "--steps", str(steps), restarts=1)
    assert code == 0, said[-2000:]
    assert [record["kind"] for record in records_of(run)].count("start") == 1
    assert any(select(records_of(run), "resume"))
    bits = step_bits(run)
    assert list(bits) == list(range(1, steps + 1))
    assert list(bits.values())[:STEPS] == list(shared_oracle.steps.values())


def torchrun_and_signal(
    how: signal.Signals, run: Path, setting: Setting, *arguments: str, restarts: int = 0
) -> tuple[int, str, int]:
    """Send a signal to rank 1 after a step; return torchrun's exit code, what it wrote, and the id of that process."""
    python, *launcher = torchrun_words(2)
    words = [python, *launcher[:2], f"--max-restarts={restarts}", *launcher[2:], "train", str(run)]
    words += [*command_arguments(setting), *TWO_MICRO_BATCHES, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as job:
        try:
            until = time.monotonic() + HANGS
            while reached(run) < INTERVAL + 1 and job.poll() is None:
                assert time.monotonic() < until, f"step {INTERVAL + 1} was not reached"
                time.sleep(0.05)
            rank = process_of(job.pid, rank=1)
            os.kill(rank, how)
            said = job.communicate(timeout=HANGS)[0]
        finally:
            job.kill()
    return job.returncode, said, rank


@pytest.mark.slow
def test_the_nodes_that_are_left_go_on(setting: Setting, shared_oracle: Oracle, tmp_path: Path) -> None:
    """Two agents of an elastic job on one host; one is killed with its rank, and the other's goes on alone."""
    run, steps, started = tmp_path / "run", 10 * STEPS, []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"]
    words += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=last_call_timeout=5"]
    words += ["-m", "resmol", "train", str(run), *command_arguments(setting), *TWO_MICRO_BATCHES]
    words += ["--steps", str(steps), *set_all(f"runtime.collective_timeout={PATIENCE}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        for _ in range(2):  # the first one holds the store
            started.append(subprocess.Popen(words, env=environment))
            time.sleep(2)
        until = time.monotonic() + HANGS
        while reached(run) < INTERVAL + 1:
            assert time.monotonic() < until, f"step {INTERVAL + 1} was not reached"
            time.sleep(0.05)
        children = Path(f"/proc/{started[1].pid}/task/{started[1].pid}/children").read_text(encoding="ascii").split()
        for process in (started[1].pid, *map(int, children)):  # the agent first, or it starts its rank again
            os.kill(process, signal.SIGKILL)
        assert started[0].wait(timeout=HANGS) == 0
    finally:
        for agent in started:
            agent.kill()
            agent.wait()
    bits = step_bits(run)
    assert list(bits) == list(range(1, steps + 1))
    assert list(bits.values())[:STEPS] == list(shared_oracle.steps.values())


def test_w7_torchrun_starts_the_ranks_again(
    campaign: Campaign, setting: Setting, shared_oracle: Oracle, tmp_path: Path
) -> None:
    """Ranks are killed at random times under ``torchrun --max-restarts``; nobody does anything about it."""
    jobs, kills, draw, problems = campaign.count(1, 8), campaign.count(1, 5), campaign.draw("W7"), []
    for number in range(jobs):
        run = tmp_path / f"run-{number}"
        launcher = [*torchrun_words(2)]
        launcher[3:3] = [f"--max-restarts={kills}"]
        words = [*launcher, "train", str(run), *command_arguments(setting), *TWO_MICRO_BATCHES]
        after = sorted(draw.sample(range(2, STEPS - INTERVAL), kills))
        found = kill_under_torchrun(words, run, [(step, draw.randrange(2)) for step in after], tmp_path / "said")
        problems += [f"job {number}: {text}" for text in found + shared_oracle.differences(run)]
    campaign.record(
        "W7", "ranks are killed at random times under torchrun --max-restarts", "the run ends by itself, with the bits "
        "of one that nothing happened to", problems, jobs * kills,
    )  # fmt: skip


def kill_under_torchrun(words: list[str], run: Path, victims: list[tuple[int, int]], output: Path) -> list[str]:
    """Start a job; kill a rank after each of the steps; return what is wrong at its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with output.open("w") as file, subprocess.Popen(words, stdout=file, stderr=file, env=environment) as job:
        try:
            for step, rank in victims:
                until = time.monotonic() + HANGS
                while job.poll() is None and time.monotonic() < until:
                    with suppress(OSError, StopIteration):  # there is none of that rank, or no longer
                        if reached(run) >= step:
                            os.kill(process_of(job.pid, rank), signal.SIGKILL)
                            break
                    time.sleep(0.01)
            code = job.wait(timeout=HANGS)
        finally:
            job.kill()
    return [] if code == 0 else [f"exit code {code}: {output.read_text()[-1500:]}"]


def process_of(parent: int, rank: int) -> int:
    """Return the child of torchrun that has this rank."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()
    wanted = f"RANK={rank}".encode()
    return next(int(c) for c in children if wanted in Path(f"/proc/{c}/environ").read_bytes().split(b"\0"))


# --- W5 ---------------------------------------------------------------------------------------------------------

COMPLETE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def partly_launched(variables: dict[str, str], run: Path, setting: Setting) -> int:
    """Do what `resmol train RUN` does where only these of a launcher's variables are there."""
    os.environ.update(variables)
    return command(run, setting, "--steps", "2")


def test_w5_partly_launched(campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path) -> None:
    """Some of a launcher's variables are left over, missing or empty."""
    states = list(itertools.product(("set", "empty", "absent"), repeat=len(COMPLETE)))[1:-1]
    problems, tried = [], campaign.draw("W5").sample(states, campaign.count(12, len(states)))
    for number, state in enumerate(tried):
        run = tmp_path / f"run-{number}"
        named = [name for name, what in zip(COMPLETE, state, strict=True) if what != "absent"]
        chosen = dict(zip(COMPLETE, state, strict=True))
        variables = {name: COMPLETE[name] if chosen[name] == "set" else "" for name in named}
        code = forks.run(partly_launched, variables, run, setting)
        message = error_of(run)
        found = [] if code == 2 else [f"exit code {code}"]
        found += [f"{name} is not named: {message}" for name in COMPLETE if name not in message]
        found += ["a directory was made"] if run.exists() else []
        problems += [f"{variables}: {text}" for text in found[:1]]
    campaign.record(
        "W5", "only some of a launcher's variables are there, or some are empty",
        "exit 2 with the names of all, and nothing is trained", problems, len(tried), exhaustive=campaign.full,
    )  # fmt: skip
