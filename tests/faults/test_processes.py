"""Rows F1 to F10: signals, readers that do not read, several processes, clocks, machines, and what a run is made of."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from datetime import datetime, timedelta, tzinfo
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from campaign import Campaign
from trials import (
    INTERVAL,
    STEPS,
    Forks,
    Oracle,
    Setting,
    command,
    command_arguments,
    error_of,
    finish,
    run_command_line,
    step_bits,
)
from waiting import HANGS

import resmol.audit.audit
import resmol.run.async_save
import resmol.run.ledger
import resmol.system.host
import resmol.train.loop
import resmol.train.start
import resmol.train.step
from resmol.checks import Check
from resmol.config.load import load_config, with_overrides
from resmol.config.run_config import RunConfig, drift_classes, flatten
from resmol.errors import ConfigError, RunInUse
from resmol.run.checkpoint_manifest import list_checkpoints, step_of
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, effective_steps, read_ledger, select

TERMINATED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT


def records_of(run: Path) -> list[Record]:
    """Return the records of a run's ledger; none where there is no ledger."""
    return read_ledger(RunDir(run).ledger).records if RunDir(run).ledger.exists() else []


def reached(run: Path) -> int:
    """Return the last step that a run's ledger has."""
    return max(effective_steps(records_of(run)), default=0)


def newest(run: Path) -> int:
    """Return the step of the newest checkpoint; 0 where there is none."""
    return max((step_of(path) for path in list_checkpoints(RunDir(run).checkpoints)), default=0)


def goes_on(forks: Forks, run: Path, setting: Setting, oracle: Oracle, *arguments: str) -> list[str]:
    """Start the run again: it must come to its end, as if nothing had happened."""
    code = forks.run(command, run, setting, *arguments)
    if code != 0:
        return [f"started again: exit code {code}: {error_of(run).strip()}"]
    return [*oracle.differences(run), *([] if reached(run) == STEPS else ["the run is not complete"])]


def set_all(*overrides: str) -> list[str]:
    """Return the arguments that set these."""
    return [word for override in overrides for word in ("--set", override)]


def die_after(step: int, run: Path, setting: Setting, *arguments: str) -> int:
    """Train; be killed once a step is recorded and no save is on its way: no timing decides where it goes on."""
    real = resmol.train.loop.record_step

    def record_and_die(session: Any, result: Any, seconds: float) -> None:
        real(session, result, seconds)
        if result.step == step:
            session.checkpointer.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)

    resmol.train.loop.record_step = record_and_die
    return command(run, setting, *arguments)


# --- F1, F2: signals ---------------------------------------------------------------------------------------------


def send_in(
    place: str, number: int, signals: Sequence[signal.Signals], run: Path, setting: Setting, *arguments: str
) -> int:
    """Train; as it returns from the ``number``-th call of a function, where that is called, signals come."""
    modules = (
        resmol.run.async_save,
        resmol.train.step,
        resmol.train.loop,
    )
    module = next(module for module in modules if hasattr(module, place))
    real, calls = getattr(module, place), 0

    def call_and_send(*values: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = real(*values, **options)
        if calls == number:
            for one in signals:
                os.kill(os.getpid(), one)
        return result

    setattr(module, place, call_and_send)
    return command(run, setting, *arguments)


def stopped_well(run: Path, code: int, wanted: int, name: str) -> list[str]:
    """Look at a run that a signal stopped: the exit code, and nothing lost."""
    found = [] if code == wanted else [f"exit code {code}: {error_of(run)}"]
    found += [] if newest(run) == reached(run) else [f"step {reached(run)} reached, step {newest(run)} saved"]
    stops = [record["reason"] for record in select(records_of(run), "stop")]
    return found + ([] if stops[-1:] == [name] else [f"recorded as {stops}"])


def test_f1_terminated_at_any_time(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """SIGTERM after a random time, every other time a second one shortly after; then the run goes on."""
    count, draw, problems, saved = campaign.count(3, 50), campaign.draw("F1"), [], 0
    started = time.perf_counter()
    assert forks.run(command, tmp_path / "whole", setting) == 0
    duration = time.perf_counter() - started
    trials = 0
    while trials < count or (not saved and trials < 20 * count):  # how long a run takes changes on a busy machine
        trial, trials = trials, trials + 1
        run = tmp_path / f"run-{trial}"
        child = forks.start(command, run, setting)
        time.sleep(draw.uniform(0.1, 1) * duration)
        for pause in [0, draw.uniform(0, 0.02)][: 1 + trial % 2]:
            time.sleep(pause)
            if child.is_alive():
                child.terminate()
        code = finish(child)
        if code == TERMINATED:
            found, saved = stopped_well(run, code, TERMINATED, "SIGTERM"), saved + 1
        elif code in (0, -signal.SIGTERM):  # finished, or before it began: the shell calls the latter 143 as well
            found = [] if newest(run) == reached(run) else [f"{reached(run) - newest(run)} steps lost"]
        else:
            found = [f"exit code {code}: {error_of(run)}"]
        found += goes_on(forks, run, setting, oracle)
        problems += [f"trial {trial}: {text}" for text in found[:1]]
    assert saved, "no signal came while the run was being trained"
    campaign.record(
        "F1", "SIGTERM at a random time, once or twice", "exit 143, no step lost, the same bits after a restart",
        problems, trials, note=f"{saved} came between the first step and the last",
    )  # fmt: skip


def test_f1_terminated_where_it_hurts(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """Signals in the middle of a step, of a save, of an evaluation, of a sample, of retention; also several."""
    term, interrupt = signal.SIGTERM, signal.SIGINT
    cases = [
        ("accumulate_gradients", 7, [term], TERMINATED),
        ("gradient_norm", 10, [term, term], TERMINATED),
        ("stage_checkpoint", 2, [term], TERMINATED),
        ("commit_checkpoint", 3, [term, interrupt, term], TERMINATED),
        ("prune", 5, [term], TERMINATED),
        ("evaluate", 1, [term], TERMINATED),
        ("evaluate", 2, [term, term], TERMINATED),
        ("generate", 1, [term], TERMINATED),
        ("accumulate_gradients", 23, [interrupt, term], INTERRUPTED),
        ("evaluate", 1, [interrupt], INTERRUPTED),
    ]
    chosen = cases if campaign.full else campaign.draw("F1c").sample(cases, 3)
    extra = set_all("evaluation.every=7", "evaluation.windows=4", "sampling.every=7", "sampling.max_new_tokens=3")
    problems = []
    for number, (place, call, signals, wanted) in enumerate(chosen):
        run = tmp_path / f"run-{number}"
        code = forks.run(send_in, place, call, signals, run, setting, *extra)
        found = stopped_well(run, code, wanted, signals[0].name)
        found += goes_on(forks, run, setting, oracle, *extra)
        problems += [f"{[s.name for s in signals]} in {place}: {text}" for text in found[:1]]
    campaign.record(
        "F1c", "SIGTERM or SIGINT during a step, save, evaluation, sample, retention",
        "the first one counts, nothing is cut short", problems, len(chosen), exhaustive=campaign.full,
    )  # fmt: skip


def test_f2_other_signals(campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path) -> None:
    """SIGINT and the signals of batch systems are like SIGTERM; SIGHUP and SIGPIPE do not end a run."""
    count, draw, problems = campaign.count(1, 10), campaign.draw("F2"), []
    stopping = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
    for trial in range(count):
        for one in (*stopping, signal.SIGHUP, signal.SIGPIPE):
            run, step = tmp_path / f"run-{trial}-{one.name}", draw.randint(1, STEPS - 1)
            code = forks.run(send_in, "accumulate_gradients", step, [one], run, setting)
            if one in stopping:
                found = stopped_well(run, code, 128 + one, one.name) + goes_on(forks, run, setting, oracle)
                found += [] if newest(run) == STEPS else ["not complete"]
            else:
                found = [] if (code, reached(run)) == (0, STEPS) else [f"exit code {code} at step {reached(run)}"]
                found += oracle.differences(run)
            problems += [f"{one.name} in step {step}: {text}" for text in found[:1]]
    campaign.record(
        "F2", "SIGINT, SIGUSR1, SIGUSR2, SIGXCPU, SIGHUP, SIGPIPE during training",
        "the first four save and exit with 128 + n, HUP and PIPE are survived", problems, 6 * count,
    )  # fmt: skip


def new_process(run: Path, setting: Setting, *arguments: str) -> list[str]:
    """Return the command of a real `resmol train`."""
    return [sys.executable, "-m", "resmol", "train", str(run), *command_arguments(setting), *arguments]


def with_environment(**values: str) -> dict[str, str]:
    """Return the environment of such a process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **values}


def test_f2_output_into_head(campaign: Campaign, setting: Setting, oracle: Oracle, tmp_path: Path) -> None:
    """`resmol train ... 2>&1 | head -1`: the reader goes away after the first line."""
    count, problems = campaign.count(1, 10), []
    for trial in range(count):
        run = tmp_path / f"run-{trial}"
        writer = subprocess.Popen(
            new_process(run, setting, *set_all("logging.every=1")), env=with_environment(), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert writer.stdout is not None
        head = subprocess.run(["head", "-1"], stdin=writer.stdout, capture_output=True, timeout=HANGS)
        writer.stdout.close()
        code = writer.wait(timeout=HANGS)
        found = [] if (code, reached(run)) == (0, STEPS) else [f"exit code {code} at step {reached(run)}"]
        found += [] if head.stdout.count(b"\n") == 1 else [f"head saw {head.stdout!r}"]
        found += oracle.differences(run)
        problems += [f"trial {trial}: {text}" for text in found[:1]]
    campaign.record("F2h", "output piped into `head -1`", "training goes on to the end", problems, count)


# --- F4: several processes at once -------------------------------------------------------------------------------


def contend(go: Path, ended: Path, number: int, others: int, run: Path, setting: Setting) -> int:
    """Start training the moment ``go`` appears; whoever may train waits until the others have given up."""
    real = resmol.train.start.train

    def train_last(state: Any, session: Any) -> None:
        deadline = time.monotonic() + HANGS / 2
        while len(list(ended.iterdir())) < others and time.monotonic() < deadline:
            time.sleep(0.002)
        real(state, session)

    resmol.train.start.train = train_last
    while not go.exists():
        pass
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = run_command_line(["train", str(run), *command_arguments(setting)], debug=False)
    result = ended.with_name(f"{ended.name}-{number}")
    result.write_text(json.dumps({"code": code, "pid": os.getpid(), "said": said.getvalue()}))
    result.rename(ended / str(number))
    return 0


def contest(forks: Forks, count: int, run: Path, setting: Setting) -> list[dict[str, Any]]:
    """Let so many processes train the same run at once, half of them by another name of it."""
    go, ended, alias = run.with_name(f"{run.name}.go"), run.with_name(f"{run.name}.ended"), run.with_name("alias")
    ended.mkdir()
    alias.unlink(missing_ok=True)
    alias.symlink_to(run, target_is_directory=True)
    run.mkdir(exist_ok=True)
    names = [run if number % 2 else alias for number in range(count)]
    children = [forks.start(contend, go, ended, number, count - 1, names[number], setting) for number in range(count)]
    time.sleep(0.05)
    go.touch()
    for child in children:
        finish(child)
    return [json.loads(path.read_text()) for path in sorted(ended.iterdir())]


def test_f4_many_processes_one_run(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """2 to 8 at once: one trains, the others say who does; afterwards the same on a run whose owner was killed."""
    count, draw, problems = campaign.count(2, 25), campaign.draw("F4"), []
    for trial in range(count):
        run, processes = tmp_path / f"run-{trial}", draw.randint(2, 8) if campaign.full else 3 + 3 * trial
        killed = trial % 2 == 1
        if killed:
            code = forks.run(die_after, draw.randint(1, STEPS), run, setting)
            assert code == -signal.SIGKILL
        before = len(records_of(run))
        results = contest(forks, processes, run, setting)
        trained = [result for result in results if result["code"] == 0]
        found = [] if len(results) == processes else [f"{len(results)} of {processes} processes answered"]
        if len(trained) != 1:
            found.append(f"{len(trained)} trained; exit codes {[result['code'] for result in results]}")
        for result in results:
            owner = (f"process {trained[0]['pid']} on {socket.gethostname()}",) if trained else ()
            if result["code"] == 0:
                continue
            if result["code"] != RunInUse.exit_code or not all(word in result["said"] for word in owner):
                found.append(f"exit code {result['code']}, expected owner {owner}: {result['said']!r}")
        added = Counter(record["kind"] for record in records_of(run)[before:])
        found += [] if added["start"] + added["resume"] <= 1 else [f"more than one beginning: {added}"]
        found += [] if added["stop"] == 1 and reached(run) == STEPS else [f"not trained once to the end: {added}"]
        found += oracle.differences(run)
        problems += [f"{processes} processes: {text}" for text in found[:1]]
    campaign.record(
        "F4", "2 to 8 processes at once in one run directory", "one trains, the others exit with 75 and name it",
        problems, count,
    )  # fmt: skip


# --- F5: clocks --------------------------------------------------------------------------------------------------


def command_with_wrong_clock(seed: int, die_at: int, run: Path, setting: Setting) -> int:
    """Train while the clock jumps by up to a day, back and forth, at every look at it."""
    draw = random.Random(seed)
    real_time, real_time_ns = time.time, time.time_ns

    def skew() -> float:
        return draw.uniform(-86400, 86400)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + timedelta(seconds=skew())

    time.time = lambda: real_time() + skew()
    time.time_ns = lambda: real_time_ns() + int(1e9 * skew())
    resmol.run.ledger.datetime = Clock
    return die_after(die_at, run, setting) if die_at else command(run, setting)


def audit(run: Path) -> int:
    """Audit a run."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return run_command_line(["audit", str(run)], debug=False)


def without_time(records: list[Record]) -> list[Record]:
    """Take away what the time of day decides, the hashes of it, and how many steps later a save was recorded."""
    gone = {"time", "seconds", "stall_seconds", "prev", "manifest_sha256", "seq"}
    kept = [{key: value for key, value in record.items() if key not in gone} for record in records]
    return sorted(kept, key=lambda record: record["kind"] == "save")  # stable: both keep their order


def test_f5_wrong_clocks(campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path) -> None:
    """Killed and resumed with clocks that jump, and with file times that say the oldest checkpoint is the newest."""
    count, draw, problems, negative = campaign.count(1, 20), campaign.draw("F5"), [], 0
    for trial in range(count):
        die_at, seed = draw.randint(2 * INTERVAL + 1, STEPS - 1), draw.randrange(2**32)
        plain, run = tmp_path / f"plain-{trial}", tmp_path / f"run-{trial}"
        codes = [
            forks.run(die_after, die_at, plain, setting), forks.run(command, plain, setting),
            forks.run(command_with_wrong_clock, seed, die_at, run, setting),
        ]  # fmt: skip
        for age, path in enumerate(list_checkpoints(RunDir(run).checkpoints)):
            for file in (*path.iterdir(), path):
                os.utime(file, times=(time.time() - 86400 * (age % 2 * 2 - 1),) * 2)
        codes += [forks.run(command_with_wrong_clock, seed + 1, 0, run, setting), forks.run(audit, run)]
        found = [] if codes == [-9, 0, -9, 0, 0] else [f"exit codes {codes}: {error_of(run)}"]
        records = records_of(run)
        for here, there in itertools.zip_longest(without_time(records), without_time(records_of(plain))):
            found += [] if here == there else [f"{here} instead of {there}"]
        found += [f"{r['kind']} took {r['seconds']} s" for r in records if r.get("seconds", 0) < 0]
        found += oracle.differences(run)
        problems += [f"trial {trial}: {text}" for text in found[:1]]
        times = [datetime.fromisoformat(record["time"]) for record in records]
        negative += sum(later < earlier for earlier, later in itertools.pairwise(times))
    assert negative > count, "the clock did not jump"
    campaign.record(
        "F5", "the clock jumps by up to a day, file times are exchanged", "no other decision, no negative duration",
        problems, count, note=f"{negative} jumps backwards",
    )  # fmt: skip


# --- F6: other machines ------------------------------------------------------------------------------------------


def command_elsewhere(fact: str, run: Path, setting: Setting, *arguments: str) -> int:
    """Train where one fact about the machine or its libraries is another one."""
    if fact == "threads":
        torch.set_num_threads(2)
    elif fact == "torch":
        torch.__version__ = "2.99.0"
    elif fact == "processor":
        resmol.system.host.processor_name = lambda: "another processor"
    elif fact == "system":
        platform.machine = lambda: "another machine"
    return command(run, setting, *arguments)


def command_on_older_processor(run: Path, setting: Setting, *arguments: str) -> int:
    """Train in a new process whose PyTorch may not use the widest vectors."""
    narrower = {"AVX512": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default")
    process = subprocess.run(
        new_process(run, setting, *arguments), env=with_environment(ATEN_CPU_CAPABILITY=narrower), capture_output=True,
        text=True, timeout=HANGS,
    )  # fmt: skip
    (run.parent / f"{run.name}.error").write_text(process.stderr)
    return process.returncode


def test_f6_environment_changes(
    campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path
) -> None:
    """A killed run is resumed elsewhere: --strict refuses, otherwise the ledger says that equality is void."""
    any_threads = set_all("runtime.threads=0")
    template, problems = tmp_path / "template", []
    assert forks.run(die_after, 33, template, setting, *any_threads) == -signal.SIGKILL
    facts = ["nothing", "threads", *(["torch", "processor", "system"] if campaign.full else [])]
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        facts.append("cpu_capability")
    for fact in facts:
        run = tmp_path / fact
        shutil.copytree(template, run)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
        codes = []
        for extra in (("--strict",), ()):
            arguments = [*any_threads, *extra]
            if fact == "cpu_capability":
                codes.append(command_on_older_processor(run, setting, *arguments))
            else:
                codes.append(forks.run(command_elsewhere, fact, run, setting, *arguments))
            if extra and fact != "nothing":
                changed = [
                    path.name for path, content in before.items() if not path.exists() or path.read_bytes() != content
                ]
                problems += [f"{fact}: --strict changed {name}" for name in changed[:1]]
        found = [] if codes == [0 if fact == "nothing" else ConfigError.exit_code, 0] else [f"exit codes {codes}"]
        warnings = [r for r in select(records_of(run), "warn") if r["what"].startswith("environment changed")]
        changes = [set(warning["changes"]) for warning in warnings]
        found += [] if changes == ([] if fact == "nothing" else [{fact}]) else [f"recorded {changes}"]
        found += oracle.differences(run) if fact == "nothing" else []
        found += [] if reached(run) == STEPS else [f"ended at step {reached(run)}: {error_of(run)}"]
        problems += [f"{fact}: {text}" for text in found[:1]]
    campaign.record(
        "F6", "another thread count, processor, instruction set or PyTorch", "recorded; --strict refuses",
        problems, len(facts), exhaustive=campaign.full, note=", ".join(facts),
    )  # fmt: skip


# --- F7: the schedule --------------------------------------------------------------------------------------------


def trace_rates(trace: Path, run: Path, setting: Setting, *arguments: str) -> int:
    """Train; write down the learning rate that the optimizer was given at each step, bit for bit."""
    real = resmol.train.step.apply_update

    def apply(optimizer: torch.optim.AdamW, **options: Any) -> None:
        real(optimizer, **options)
        with trace.open("a") as file:
            file.write(" ".join(sorted({float(group["lr"]).hex() for group in optimizer.param_groups})) + "\n")

    resmol.train.step.apply_update = apply
    return command(run, setting, *arguments)


SCHEDULES = {
    "wsd": [],
    "wsd with a decay": ["schedule.decay_start=45", "schedule.decay_steps=12", "schedule.final_fraction=0.1"],
    "cosine": ["schedule.kind=cosine", "schedule.horizon=60"],
    "cosine that ends early": ["schedule.kind=cosine", "schedule.horizon=52", "schedule.final_fraction=0.1"],
    "constant": ["schedule.kind=constant", "schedule.warmup_steps=0"],
}
HORIZONS = ("schedule.horizon=70", "schedule.decay_start=50", "schedule.decay_steps=13", "schedule.warmup_steps=11")


def test_f7_the_horizon_is_not_the_last_step(
    campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path
) -> None:
    """To 60 in one go, and to 50 and then on to 60: the same learning rates. Another horizon is refused."""
    problems, refused = [], 0
    names = list(SCHEDULES) if campaign.full else ["wsd with a decay", "cosine"]
    for number, name in enumerate(names):
        schedule = SCHEDULES[name]
        arguments, traces = set_all(*schedule), []
        for way, stops in (("straight", (60,)), ("stopped", (50, 60))):
            run, trace = tmp_path / f"{way}-{number}", tmp_path / f"{way}-{number}.trace"
            codes = [forks.run(trace_rates, trace, run, setting, *arguments, "--steps", str(stop)) for stop in stops]
            problems += [] if not any(codes) else [f"{name}: exit codes {codes}"]
            traces.append(trace.read_text().split("\n"))
            recorded = [record["lr"].hex() for _, record in sorted(effective_steps(records_of(run)).items())]
            problems += [] if recorded == traces[-1][:-1] else [f"{name}: not the learning rates that were recorded"]
        different = [step for step, (a, b) in enumerate(zip(*traces, strict=True), start=1) if a != b]
        problems += [f"{name}: other learning rates from step {different[0]} on"] if different else []
        for change in HORIZONS if campaign.full else HORIZONS[:1]:
            if change in schedule:
                continue
            code = forks.run(command, run, setting, *arguments, *set_all(change), "--steps", "62")
            refused += 1
            if code != ConfigError.exit_code or reached(run) != STEPS:
                problems.append(f"{name}: {change} was not refused ({code})")
    campaign.record(
        "F7", "to step 50, then on to 60; another horizon", "the learning rates of a straight run; refused", problems,
        len(names) + refused, exhaustive=campaign.full,
    )  # fmt: skip


# --- F8: the configuration ---------------------------------------------------------------------------------------

# Values that are allowed when nothing else is changed; other fields are changed by rule (`another_value`).
OTHER_VALUES: dict[str, Any] = {
    "model.hidden_size": 128, "model.num_attention_heads": 8, "model.num_key_value_heads": 4,
    "model.max_position_embeddings": 128, "tokenizer.sha256": "0" * 64, "data.seq_len": 16,
    "batch.global_batch_tokens": 128, "batch.micro_batch_size": 1, "schedule.kind": "constant",
    "optimizer.beta2_halflife_tokens": 1_000_000,
    "runtime.device": "cuda", "runtime.determinism": "off", "runtime.attention": "eager",
    "runtime.compile": "on", "checkpoint.permanent": [23], "sampling.prompt": "ka lo",
    "train.steps": 26,
}  # fmt: skip
TRACKERS = ("wandb", "trackio")
SENTENCES = {  # of fields that are looked at before the configurations are compared
    "tokenizer.sha256": "the tokenizer has sha256",
    "averaging.fraction": "this run averages since its first step with 0.5",
    "averaging.every": "this run averages since its first step with 0.5, every 2",
}
STORED = set_all("schedule.decay_start=40", "schedule.decay_steps=20", "sampling.max_new_tokens=3")


def is_named(key: str, kind: str, error: str) -> bool:
    """Return whether an error names a field with its class, or in the sentence that the field has of its own."""
    return f"{key} (class {kind})" in error or SENTENCES.get(key, "no such sentence") in error


def choices(key: str) -> tuple[Any, ...]:
    """Return the values that a field may have; none where they are not listed."""
    section, _, name = key.partition(".")
    kind: Any = RunConfig.model_fields[section].annotation
    kind = kind.model_fields[name].annotation if name else kind
    return get_args(kind) if get_origin(kind) is Literal else ()


def another_value(key: str, value: Any) -> Any:
    """Return another value of a field."""
    if key in OTHER_VALUES:
        return OTHER_VALUES[key]
    if choices(key):
        return next(choice for choice in choices(key) if choice not in (value, "auto"))
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value}x"
    return value + 1 if isinstance(value, int) else value / 2 or 0.5


def drift(
    forks: Forks, run: Path, setting: Setting, key: str, config: RunConfig, expected: dict[int, tuple[Any, ...]]
) -> list[str]:
    """Change one field of a stored run at step 20 and go on to step 25; return what is not as its class says."""
    kind, old = drift_classes()[key], flatten(config)[key]
    new = another_value(key, old)
    change = f"{key}={json.dumps(new)}"
    assert flatten(with_overrides(config, [change]))[key] == new != old  # allowed, and another one
    steps = [] if key == "train.steps" else ["--steps", "20" if key == "runtime.compile" else "25"]
    arguments = [*STORED, *steps, "--set", change]
    if key == "data.path":  # --data says where; the same data at another place
        moved = run.parent / "moved-data"
        shutil.copytree(setting.data, moved)
        setting = Setting(setting.config, moved, setting.tokenizer)
    before, found = (RunDir(run).ledger.read_bytes(), RunDir(run).config.read_bytes()), []
    code = forks.run(command, run, setting, *arguments)
    after = (RunDir(run).ledger.read_bytes(), RunDir(run).config.read_bytes())
    if kind in "AB":
        found += [] if code == ConfigError.exit_code else [f"exit code {code}"]
        found += [] if is_named(key, kind, error_of(run)) else [f"it says {error_of(run)}"]
        found += [] if after == before else ["refused, and yet something was written"]
        found += [] if (f"--accept-drift {key}" in error_of(run)) == (kind == "B") else ["the wrong advice"]
        code = forks.run(command, run, setting, *arguments, "--accept-drift", key)
    if kind == "A" or (key == "runtime.device" and not torch.cuda.is_available()):
        found += [] if code == ConfigError.exit_code else [f"accepted: exit code {code}"]
        return found + ([] if RunDir(run).ledger.read_bytes() == before[0] else ["accepted: the ledger was changed"])
    found += [] if code == 0 else [f"exit code {code}: {error_of(run)}"]
    drifts = [record["changes"] for record in select(records_of(run), "drift")]
    found += [] if drifts == ([{key: {"from": old, "to": new}}] if kind == "B" else []) else [f"recorded {drifts}"]
    found += [] if flatten(load_config(RunDir(run).config))[key] == new or key == "data.path" else ["not stored"]
    last = {"runtime.compile": 20, "train.steps": 26}.get(key, 25)
    found += [] if reached(run) == last else [f"at step {reached(run)}"]
    if kind == "C":
        bits = step_bits(run)
        found += [f"step {step} has other bits" for step in bits if bits[step] != expected[step]]
    return found


def fields_to_try(campaign: Campaign, row: str, some: dict[str, int], without: Sequence[str] = ()) -> list[str]:
    """Return the fields that can have another value; outside a campaign, so many of each class, drawn for the row.

    The tables of a mixture are no fields of a run on one text; tests/train/test_mixture.py changes them.
    """
    classes = drift_classes()
    without = [
        *without,
        "data.source",
        "data.stage",
        *(f"logging.{name}" for name in TRACKERS if find_spec(name) is None),
    ]
    keys = [key for key in classes if len(choices(key)) != 1 and key not in without]  # one allowed value cannot drift
    if campaign.full:
        return keys
    draw = campaign.draw(row)
    return [key for kind, count in some.items()
            for key in draw.sample([key for key in keys if classes[key] == kind], count)]  # fmt: skip


def copy_of(template: Path, folder: Path) -> Path:
    """Copy a run into a folder of its own, and return the copy."""
    folder.mkdir()
    return Path(shutil.copytree(template, folder / "run"))


def test_f8_every_field_drifts(campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path) -> None:
    """One field at a time, on a real run: class A refuses, B wants to be accepted and is recorded, C is free."""
    pytest.importorskip("tensorboardX")
    template, whole, problems = tmp_path / "template", tmp_path / "whole", []
    assert forks.run(command, template, setting, *STORED, "--steps", "20") == 0
    assert forks.run(command, whole, setting, *STORED, "--steps", "26") == 0
    config, expected = load_config(RunDir(template).config), step_bits(whole)
    classes = drift_classes()
    assert set(classes) == set(flatten(config))
    assert set(classes.values()) == {"A", "B", "C"}
    keys = fields_to_try(campaign, "F8", {"A": 8, "B": 4, "C": 5})
    for key in keys:
        run = copy_of(template, tmp_path / key)
        problems += [
            f"{key} (class {classes[key]}): {text}" for text in drift(forks, run, setting, key, config, expected)[:1]
        ]
    campaign.record(
        "F8", "one field of the configuration changed", "class A refused, B accepted and recorded, C free", problems,
        len(keys), exhaustive=campaign.full, note=str(dict(sorted(Counter(classes[key] for key in keys).items()))),
    )  # fmt: skip


def checks_of(run: Path) -> list[Check]:
    """Audit a run strictly, in this process."""
    return resmol.audit.audit.audit(RunDir(run), strict=True)


def resume_alone(run: Path, setting: Setting, *arguments: str) -> int:
    """Do what `resmol train RUN` does without a configuration: the stored one counts."""
    words = ["--data", str(setting.data), "--tokenizer", str(setting.tokenizer), *arguments]
    with (run.parent / f"{run.name}.error").open("w", buffering=1, encoding="utf-8") as file, redirect_stderr(file):
        return run_command_line(["train", str(run), *words], debug=False)


def edited(
    forks: Forks, run: Path, setting: Setting, key: str, config: RunConfig, expected: dict[int, tuple[Any, ...]]
) -> list[str]:
    """Change one field in config.toml and resume; return what is not as the field's class says."""
    kind, old = drift_classes()[key], flatten(config)[key]
    new, found = another_value(key, old), []
    RunDir(run).config.write_text(config.replace({key: new}).to_toml(), encoding="utf-8")
    before = RunDir(run).ledger.read_bytes()
    code = forks.run(resume_alone, run, setting, "--steps", "22")
    if kind == "C":
        found += [] if code == 0 else [f"exit code {code}: {error_of(run)}"]
        return found + [
            f"step {step} has other bits" for step, bits in step_bits(run).items() if bits != expected[step]
        ]
    found += [] if code == ConfigError.exit_code else [f"exit code {code}: {error_of(run)}"]
    found += [] if is_named(key, kind, error_of(run)) else [f"it says {error_of(run)}"]
    found += [] if RunDir(run).ledger.read_bytes() == before else ["refused, and yet the ledger was changed"]
    failed = [check.name for check in checks_of(run) if not check.passed]
    return found + ([] if failed == ["configuration"] else [f"the audit fails {failed}"])


def test_f8_every_field_edited(campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path) -> None:
    """One field at a time, in the config.toml of a run: as if it had been given on the command line."""
    template, whole, problems = tmp_path / "template", tmp_path / "whole", []
    assert forks.run(command, template, setting, *STORED, "--steps", "20") == 0
    assert forks.run(command, whole, setting, *STORED, "--steps", "22") == 0
    config, expected = load_config(RunDir(template).config), step_bits(whole)
    keys = fields_to_try(campaign, "F8e", {"A": 4, "B": 3, "C": 2}, without=("data.path", "train.steps"))
    for key in keys:
        run = copy_of(template, tmp_path / key)
        problems += [f"{key}: {text}" for text in edited(forks, run, setting, key, config, expected)[:1]]
    campaign.record(
        "F8e", "one field edited in the run's config.toml", "as on the command line; the audit names the field",
        problems, len(keys), exhaustive=campaign.full,
    )  # fmt: skip


# --- F9: the files of a run --------------------------------------------------------------------------------------


def test_f9_files_lost_or_exchanged(campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path) -> None:
    """Delete each file of a run, or exchange it with another run's: equal bits and a sound record, or a refusal."""
    template, other, whole, problems = (*(tmp_path / name for name in ("template", "other", "whole")), list[str]())
    assert forks.run(command, template, setting, "--steps", "20") == 0
    assert forks.run(command, other, setting, "--steps", "20", "--set", "train.seed=9") == 0
    assert forks.run(command, whole, setting, "--steps", "22") == 0
    expected = step_bits(whole)
    files = sorted(path.relative_to(template) for path in template.rglob("*") if path.is_file())
    trials = [
        (name, what) for name in files for what in ("deleted", "exchanged") if what == "deleted" or name.name != "lock"
    ]
    if not campaign.full:
        newest = Path("checkpoints/step-00000020")
        trials = [trial for trial in trials if trial[0].parent in (Path(), newest)]
    for number, (name, what) in enumerate(trials):
        run = copy_of(template, tmp_path / str(number))
        (run / name).unlink()
        if what == "exchanged":
            shutil.copy(other / name, run / name)
        code = forks.run(resume_alone, run, setting, "--steps", "22")
        label = f"{name} {what}"
        if code:
            problems += [] if "internal error" not in error_of(run) else [f"{label}: {error_of(run)}"]
            continue
        wrong = [step for step, bits in step_bits(run).items() if bits != expected[step]]
        failed = {check.name for check in checks_of(run) if not check.passed} - {f"checkpoint {name.parent.name}"}
        problems += [f"{label}: steps {wrong} differ, the audit fails {failed}"] if wrong or failed else []
    campaign.record(
        "F9", "a file of the run deleted, or that of another run", "refused, or equal bits and a sound rest",
        problems, len(trials), exhaustive=campaign.full,
    )  # fmt: skip


# --- F10: the place in the data ----------------------------------------------------------------------------------


def test_f10_the_batch_changes_on_the_way(campaign: Campaign, forks: Forks, setting: Setting, tmp_path: Path) -> None:
    """Batches of random sizes, changed and killed at random steps: every window once an epoch, in the one order."""
    draw, count, problems, batch = campaign.draw("F10"), campaign.count(3, 40), list[str](), "batch.global_batch_tokens"
    for trial in range(count):
        run, step = tmp_path / str(trial) / "run", 0
        run.parent.mkdir()
        for _ in range(4):
            step += draw.randint(1, 12)
            change = ["--set", f"{batch}={64 * draw.choice([1, 2, 4])}", "--accept-drift", batch]
            code = forks.run(command, run, setting, *change, "--steps", str(step))
            problems += [f"trial {trial}: exit code {code}: {error_of(run)}"] if code else []
        failed = [f"{check.name}: {check.measured}" for check in checks_of(run) if not check.passed]
        problems += [f"trial {trial}: {text}" for text in failed[:1]]
        epochs = [record["epoch"] for _, record in sorted(effective_steps(records_of(run)).items())]
        problems += [] if epochs == sorted(epochs) else [f"trial {trial}: epochs {epochs}"]
    campaign.record(
        "F10", "another batch size at random steps, three times", "the audit recomputes every window; none is missing",
        problems, count,
    )  # fmt: skip


# --- F3: nobody reads --------------------------------------------------------------------------------------------


def command_into_full_pipe(pipe: Path, run: Path, setting: Setting, *arguments: str) -> int:
    """Train with both outputs into a pipe; from the second step on it has no room for another byte."""
    descriptor = os.open(pipe, os.O_WRONLY)
    real = resmol.train.loop.record_step

    def fill(session: Any, result: Any, seconds: float) -> None:
        if result.step == 2:
            os.set_blocking(descriptor, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(descriptor, b".")
            os.set_blocking(descriptor, True)
        real(session, result, seconds)

    resmol.train.loop.record_step = fill
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    return run_command_line(["train", str(run), *command_arguments(setting), *arguments], debug=False)


def test_f3_nobody_reads(campaign: Campaign, forks: Forks, setting: Setting, oracle: Oracle, tmp_path: Path) -> None:
    """A pipe that is full and not read, outputs that are closed, a full disk behind them: training goes on."""
    chatty = set_all("logging.every=1", "sampling.every=5", "sampling.max_new_tokens=3")
    problems = []

    def judge(name: str, run: Path, code: int | None) -> None:
        found = [] if (code, reached(run)) == (0, STEPS) else [f"exit code {code} at step {reached(run)}"]
        found += oracle.differences(run) if reached(run) else []
        logged = RunDir(run).log.read_text(encoding="utf-8") if RunDir(run).log.exists() else ""
        found += [] if f"step {STEPS}/{STEPS}" in logged else ["train.log is not complete"]
        problems.extend(f"{name}: {text}" for text in found[:1])

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    sleeper = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    child = forks.start(command_into_full_pipe, pipe, tmp_path / "sleeping", setting, *chatty)
    try:
        code: int | None = finish(child)
    except TimeoutError:
        code = None
    judge("the reader sleeps", tmp_path / "sleeping", code)
    read = os.read(sleeper, 1 << 20)
    os.close(sleeper)
    problems += [] if b"step  1/60" in read and b"..." in read else [f"the pipe was not full: {read!r}"]

    targets = [">/dev/full 2>/dev/full", "<&- >&- 2>&-", ">&-", "2>&-", "2>/dev/full"]
    targets = targets if campaign.full else targets[:2]
    for number, target in enumerate(targets):
        run = tmp_path / f"target-{number}"
        shell = ["sh", "-c", f'exec "$0" "$@" {target}', *new_process(run, setting, *chatty)]
        code = subprocess.run(shell, env=with_environment(), timeout=HANGS, capture_output=True).returncode
        judge(target, run, code)
    campaign.record(
        "F3", "nobody reads the full pipe; outputs closed; /dev/full", "training goes on to the end", problems,
        1 + len(targets), exhaustive=campaign.full,
    )  # fmt: skip
