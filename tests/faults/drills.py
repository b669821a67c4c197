"""The commit protocol without the arithmetic: a run whose steps are made up, so that a save costs milliseconds.

Everything that touches the disk is the package's own (`train_model`, `resume_or_start`, `save`, `prune`, the ledger,
the lock); only `train` is replaced, by a script that makes up what the state after a step is. So what a reader finds
can be compared with what must be there, at thousands of instants. Each drill returns problems; an empty list is what
must come out.

Nothing here is imported by the test process: it runs in children, also on copies of the package with a fault in them
(test_mutants.py).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import shim
import torch
from safetensors.torch import load_file
from trials import Setting

import resmol.run.async_save
import resmol.train.loop
import resmol.train.start
from resmol.config.load import load_config
from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset, open_dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed, CheckpointError, ResmolError, RunInUse
from resmol.run.checkpoint import StagedCheckpoint, allocate_moments
from resmol.run.checkpoint_manifest import (
    AVERAGED,
    MANIFEST,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    Manifest,
    checkpoint_name,
    file_entry,
    list_checkpoints,
    newest_valid,
    open_checkpoint,
    step_of,
)
from resmol.run.directory import RunDir
from resmol.run.fingerprint import recorded_form
from resmol.run.ledger import read_ledger, select
from resmol.run.ranks import Ranks
from resmol.train.loop import Session, record_step, save
from resmol.train.start import train_model
from resmol.train.step import TrainState
from resmol.train.step_result import StepResult

Script = Callable[[TrainState, Session], None]
SMALL = (
    "model.hidden_size=8", "model.intermediate_size=8", "model.num_hidden_layers=1", "model.num_attention_heads=2",
    "model.num_key_value_heads=1", "checkpoint.keep_last=2",
)  # fmt: skip
PAGE = 4096


@dataclass(frozen=True)
class Equipment:
    """What a run needs and no fault concerns."""

    config: RunConfig
    dataset: Dataset
    tokenizer: Tokenizer


@lru_cache
def equipment(setting: Setting) -> Equipment:
    """Load configuration, data and tokenizer."""
    tokenizer = Tokenizer(setting.tokenizer.read_bytes(), setting.tokenizer)
    config = load_config(setting.config, [*SMALL, f"tokenizer.sha256={tokenizer.sha256}", f"data.path={setting.data}"])
    return Equipment(config, open_dataset(setting.data), tokenizer)


def open_run(run: Path, tools: Equipment, script: Script) -> TrainState:
    """Start or resume a run as the package does, with ``script`` in the place of the training loop."""
    start = resmol.train.start
    real = start.train, start.open_run_data
    start.train, start.open_run_data = script, lambda *_: (tools.dataset, tools.tokenizer)
    try:
        return train_model(tools.config, run)
    finally:
        start.train, start.open_run_data = real


def value_of(name: str, step: int) -> float:
    """What every element of a tensor is after a step."""
    return step + (sum(name.encode()) % 97) / 100


def tensors_of(state: TrainState) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in state.model.named_parameters():
        yield name, parameter.data
        moments = state.optimizer.state.get(parameter, {})
        yield from ((f"{name}.{moment}", moments[moment]) for moment in ("exp_avg", "exp_avg_sq") if moments)
    assert state.average is not None, "the trials' configuration averages the weights"
    yield from ((f"{AVERAGED}/{name}", tensor) for name, tensor in state.average.tensors.items())


def go_to(state: TrainState, session: Session, step: int) -> None:
    """Make up the steps up to ``step``, recorded as real ones are."""
    while state.step < step:
        state.step += 1
        batch = session.loader.step_after(state.windows_seen)
        state.tokens_seen += batch.tokens
        state.windows_seen = batch.windows_seen
        if not state.optimizer.state:
            allocate_moments(state.optimizer, step)
        for name, tensor in tensors_of(state):
            tensor.fill_(value_of(name, state.step))
        of_step = state.fingerprint.of_step(state.step, state.tensors, session.config, session.runtime)
        fingerprint = recorded_form(of_step, session.config.fingerprint_steps)
        result = StepResult(
            step=state.step, loss=1 / state.step, grad_norm=1.0, lr=0.01, tokens=batch.tokens,
            tokens_seen=state.tokens_seen, windows_seen=state.windows_seen,
            windows=batch.window_digest, epoch=batch.epoch, fingerprint=fingerprint,
        )  # fmt: skip
        record_step(session, result, seconds=0.1)


def saves(*steps: int) -> Script:
    """Return a script that goes to each of the steps and saves there."""

    def script(state: TrainState, session: Session) -> None:
        for step in steps:
            if step > state.step:
                go_to(state, session, step)
                save(state, session)
                session.checkpointer.wait_until_finished()  # every time the same calls, in the same order

    return script


def overlapping(*steps: int) -> Script:
    """Return a script that saves at each of the steps and goes on at once, as training does."""

    def script(state: TrainState, session: Session) -> None:
        for step in steps:
            if step > state.step:
                session.checkpointer.poll()
                go_to(state, session, step)
                save(state, session)

    return script


def nothing(_state: TrainState, _session: Session) -> None:
    """The script of a reader."""


# --- the reader --------------------------------------------------------------------------------------------------


def read(run: Path, tools: Equipment, at_least: int, *, corrupt: bool = False) -> tuple[int, list[str]]:
    """Start the run again, twice, and look at what it comes back as; return the step and what is wrong.

    Args:
        run: The run directory.
        tools: What it was started with.
        at_least: The last step whose save was acknowledged; 0 if none was.
        corrupt: A checkpoint that is not whole may lie there.
    """
    problems = []
    for path in [] if corrupt else list_checkpoints(RunDir(run).checkpoints):
        try:
            open_checkpoint(path).verify()
        except CheckpointError as error:
            problems.append(f"committed, but not whole: {error.what}")
    step = -1
    for number in ("first", "second"):
        try:
            state = open_run(run, tools, nothing)
        except Exception as error:  # whatever it is, the run does not come back
            return step, [*problems, f"{number} start: {type(error).__name__}: {getattr(error, 'what', error)}"]
        if state.step < at_least:
            problems.append(f"{number} start: at step {state.step}; step {at_least} was acknowledged")
        if step not in (-1, state.step):
            problems.append(f"{number} start: at step {state.step}, the time before at step {step}")
        step = state.step
        if step and any(not bool((tensor == value_of(name, step)).all()) for name, tensor in tensors_of(state)):
            problems.append(f"{number} start: the state is not that of step {step}")
    left = [path.name for path in RunDir(run).checkpoints.iterdir() if path.name.startswith("tmp-")]
    return step, problems + [f"left behind: {name}" for name in left]


def note_acknowledged(note: Callable[[int], None]) -> None:
    """Call ``note`` with the step whenever a checkpoint is committed."""
    real = resmol.run.async_save.commit_checkpoint

    def noting(staged: StagedCheckpoint, ranks: Ranks) -> Manifest:
        manifest = real(staged, ranks)
        note(manifest.step)
        return manifest

    resmol.run.async_save.commit_checkpoint = noting


# --- K2 and K5: the process dies at a call -----------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A run that exists, and something that it does next.

    Attributes:
        before: What was done before; None if the run does not exist.
        action: What is done, and may be cut off anywhere.
        allowed: The steps that the run may come back at.
        prepare: Changes the run in between.
        corrupt: That leaves a checkpoint that is not whole.
        with_start: Starting again may be cut off as well, not the action alone.
    """

    before: Script | None
    action: Script
    allowed: tuple[int, ...]
    prepare: Callable[[Path], None] = lambda _: None
    corrupt: bool = False
    with_start: bool = False


def save_at_10(state: TrainState, session: Session) -> None:
    go_to(state, session, 10)
    save(state, session)


def prune_to_1(_state: TrainState, session: Session) -> None:
    resmol.run.async_save.prune(session.run.checkpoints, 1)


def keep_three(state: TrainState, session: Session) -> None:
    """Save three without pruning."""
    real, resmol.run.async_save.prune = resmol.run.async_save.prune, lambda *_: []
    try:
        saves(5, 10, 15)(state, session)
    finally:
        resmol.run.async_save.prune = real


def corrupt_a_second_10(run: Path) -> None:
    """A checkpoint of the step to come lies there already, corrupt: it must be quarantined, not be in the way."""
    folder = RunDir(run).checkpoints
    shutil.copytree(folder / checkpoint_name(5), folder / checkpoint_name(10))


def take_the_name_of_10(run: Path) -> None:
    """A file has the name of the checkpoint to come; a resume does not look at it, so the save must rename it."""
    (RunDir(run).checkpoints / checkpoint_name(10)).write_text("in the way")


SCENARIOS = {
    "start": Scenario(None, nothing, (0,)),
    "resume": Scenario(saves(5), nothing, (5,), with_start=True),
    "first save": Scenario(nothing, save_at_10, (0, 10)),
    "save": Scenario(saves(5), save_at_10, (5, 10)),
    "save and prune": Scenario(keep_three, lambda a, b: saves(20)(a, b), (15, 20)),
    "quarantine": Scenario(saves(5), save_at_10, (5, 10), corrupt_a_second_10, corrupt=True),
    "name taken": Scenario(saves(5), save_at_10, (5, 10), take_the_name_of_10),
    "prune": Scenario(keep_three, prune_to_1, (15,)),
}
WAYS = ("exit-before", "exit-after", "exit-torn")


def crash_points(
    name: str, setting: Setting, folder: Path, share: int = 1, first_only: bool = False
) -> tuple[int, int, list[str]]:
    """Let the process die at every call of a scenario, in each of WAYS; read after each.

    Args:
        name: One of SCENARIOS.
        setting: What to run.
        folder: Where; it must exist.
        share: Try every share-th point only.
        first_only: Stop at the first problem.

    Returns:
        The number of points tried, that of calls, and the problems.
    """
    scenario, tools = SCENARIOS[name], equipment(setting)
    template = folder / "template" / "run"
    template.parent.mkdir()
    if scenario.before is not None:
        open_run(template, tools, scenario.before)
        scenario.prepare(template)
    code, calls = _die_at(scenario, tools, _copy(template, folder / "rehearsal"), "count", 1, folder / "count")
    problems, tried = [] if code == 0 and calls else [f"{name}: fails without a crash (exit code {code})"], 0
    for point, (number, way) in enumerate(itertools.product(range(1, calls + 1), WAYS)):
        if point % share or (first_only and problems):
            continue
        run = _copy(template, folder / f"point-{point}")
        code, acknowledged = _die_at(scenario, tools, run, way, number, folder / "note")
        tried += 1
        where = f"{name}, {way} of call {number}"
        if code != shim.KILLED:
            problems.append(f"{where}: ended with {code}")
        expected = max(acknowledged, min(scenario.allowed))
        step, found = read(run, tools, expected, corrupt=scenario.corrupt)
        if step not in scenario.allowed:
            found.append(f"came back at step {step}")
        problems += [f"{where}: {text}" for text in found]
        shutil.rmtree(run.parent)
    return tried, calls, problems


def _copy(template: Path, folder: Path) -> Path:
    folder.mkdir()
    if template.exists():
        shutil.copytree(template, folder / "run")
    return folder / "run"


def _die_at(scenario: Scenario, tools: Equipment, run: Path, way: str, number: int, note: Path) -> tuple[int, int]:
    """Play a scenario in a fork; return its exit code and, as noted, the step acknowledged (or the calls counted)."""
    note.write_text("0")
    process = os.fork()
    if process == 0:
        code = 1
        try:
            note_acknowledged(lambda step: note.write_text(str(step)) and None)
            if scenario.before is None or scenario.with_start:
                shim.arm(run.parent, way, k=number)
                open_run(run, tools, scenario.action)
            else:
                open_run(run, tools, _armed(run.parent, way, number, scenario.action))
            if way == "count":
                note.write_text(str(shim.disarm()))
            code = 0
        except BaseException:  # the fork must end here
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), int(note.read_text())


def _armed(root: Path, way: str, number: int, action: Script) -> Script:
    def script(state: TrainState, session: Session) -> None:
        shim.arm(root, way, k=number)
        action(state, session)

    return script


# --- K3: the power fails -----------------------------------------------------------------------------------------


@dataclass
class File:
    """A file as the kernel has it, as the disk has it, and which bytes are only in the former."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    dirty: list[tuple[int, int]] = field(default_factory=list)

    def after_power_loss(self, fate: str) -> bytes:
        """Return what is on the disk if what was not synced was kept, dropped, zero-filled, torn or holed."""
        if fate == "kept" or (fate != "dropped" and not self.dirty):
            return bytes(self.data)
        if fate == "dropped":
            return self.synced
        data, start = bytearray(self.data), min(first for first, _ in self.dirty)
        if fate == "zeros":
            for first, last in self.dirty:
                data[first:last] = bytes(len(data[first:last]))
            return bytes(data)
        start = min(start, len(data))
        pages = range(start - start % PAGE + PAGE, len(data), PAGE)
        border = pages[len(pages) // 2] if pages else (start + len(data)) // 2
        if fate == "torn":
            return bytes(data[:border])
        data[start:border] = bytes(border - start)  # holed: later pages were written first
        return bytes(data)


FATES = ("kept", "dropped", "zeros", "torn", "holed")
ENTRIES = ("kept", "lost", "outer lost", "inner lost")


@dataclass
class Folder:
    """A directory as the kernel has it, and as the disk has it."""

    entries: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)


class Disk:
    """Plays a log of operations and tells what a power loss may leave: POSIX at its most unkind.

    Data are safe once the file was synced; a name is safe once its directory was synced, be it new, changed or gone.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, Folder()

    def apply(self, operation: shim.Operation) -> None:
        """Do one operation."""
        folder, name = self._parent(operation.path)
        match operation.kind:
            case "mkdir":
                folder.entries[name] = Folder()
            case "create":
                folder.entries[name] = File()
            case "unlink" | "rmdir":
                del folder.entries[name]
            case "rename":
                target, new_name = self._parent(operation.to)
                target.entries[new_name] = folder.entries.pop(name)
            case "write":
                self._write(folder.entries[name], operation)
            case "truncate":
                self._truncate(folder.entries[name], operation.offset)
            case "fsync":
                self._sync(folder.entries[name] if name else self.top)

    def materialise(
        self, folder: Path, fate: Callable[[], str], is_lost: Callable[[Folder], bool], top: Folder | None = None
    ) -> None:
        """Write what a power loss leaves into ``folder``."""
        folder.mkdir()
        top = top or self.top
        for name, entry in (top.synced if is_lost(top) else top.entries).items():
            if isinstance(entry, Folder):
                self.materialise(folder / name, fate, is_lost, entry)
            else:
                (folder / name).write_bytes(entry.after_power_loss(fate()))

    def _parent(self, path: str) -> tuple[Folder, str]:
        parts = PurePosixPath(path).relative_to(self.root).parts
        folder = self.top
        for part in parts[:-1]:
            inner = folder.entries[part]
            assert isinstance(inner, Folder)
            folder = inner
        return folder, parts[-1] if parts else ""

    def _write(self, file: File | Folder, operation: shim.Operation) -> None:
        assert isinstance(file, File)
        end = operation.offset + len(operation.data)
        file.data.extend(bytes(max(0, operation.offset - len(file.data))))
        file.data[operation.offset : end] = operation.data
        file.dirty.append((operation.offset, end))

    def _truncate(self, file: File | Folder, length: int) -> None:
        assert isinstance(file, File)
        if length > len(file.data):
            file.dirty.append((len(file.data), length))
        del file.data[length:]
        file.data.extend(bytes(length - len(file.data)))

    def _sync(self, entry: File | Folder) -> None:
        if isinstance(entry, Folder):
            entry.synced = dict(entry.entries)
        else:
            entry.synced, entry.dirty = bytes(entry.data), []


def record_run(root: Path, log: Path, setting: Setting, script: Callable[..., Script]) -> int:
    """A run from its first moment over three saves, the last of which prunes, and a second start; all of it logged."""
    tools = equipment(setting)
    note_acknowledged(lambda step: shim.mark(str(step)))
    shim.arm(root, "count", log=log)
    open_run(root / "run", tools, script(5, 10, 15))
    open_run(root / "run", tools, script(20))
    return 0 if shim.disarm() else 1


def power_losses(
    setting: Setting,
    folder: Path,
    share: int = 1,
    mixtures: int = 0,
    seed: int = 0,
    fates: Sequence[str] = FATES,
    first_only: bool = False,
    meanwhile: bool = False,
) -> tuple[int, int, list[str]]:
    """Record a run, then read what a power loss leaves after each of its operations.

    Args:
        setting: What to run.
        folder: Where; it must exist.
        share: Look at every share-th state only.
        mixtures: After each operation, so many more states in which every file and directory has a fate of its own.
        seed: Of the mixtures.
        fates: What to do with data that were not synced.
        first_only: Stop at the first problem.
        meanwhile: Steps are executed and recorded while a save is on its way.

    Returns:
        The number of states, that of operations, and the problems.
    """
    (folder / "disk").mkdir()
    record_run(folder / "disk", folder / "log", setting, overlapping if meanwhile else saves)
    operations, tools = shim.read_log(folder / "log"), equipment(setting)
    disk, acknowledged, problems, tried, number = Disk(folder / "disk"), 0, [], 0, 0
    draw = random.Random(seed)
    os.fsync = lambda _: None  # the reader's own durability is not looked at, and it reads thousands of times
    for position, operation in enumerate(operations):
        if operation.kind == "mark":
            acknowledged = int(operation.path)
        else:
            disk.apply(operation)
        states: list[tuple[str, str]] = [*itertools.product(fates, ENTRIES), *[("mixed", "mixed")] * mixtures]
        for fate, entries in states:
            number += 1
            if number % share or (first_only and problems):
                continue
            state = folder / "state"
            disk.materialise(state, _fate(fate, draw), _loss(entries, draw))
            _, found = read(state / "run", tools, acknowledged)
            tried += 1
            where = f"power loss after operation {position} ({operation.kind} {Path(operation.path).name}), data {fate}"
            problems += [f"{where}, names {entries}: {text}" for text in found]
            shutil.rmtree(state)
    return tried, len(operations), problems


def _fate(fate: str, draw: random.Random) -> Callable[[], str]:
    return (lambda: draw.choice(FATES)) if fate == "mixed" else (lambda: fate)


def _loss(entries: str, draw: random.Random) -> Callable[[Folder], bool]:
    def is_lost(folder: Folder) -> bool:
        is_outer = any(isinstance(entry, Folder) for entry in [*folder.entries.values(), *folder.synced.values()])
        if entries == "mixed":
            return draw.random() < 0.5
        return entries == "lost" or entries == ("outer lost" if is_outer else "inner lost")

    return is_lost


# --- what else a mutant may break --------------------------------------------------------------------------------


def second_process(setting: Setting, folder: Path) -> list[str]:
    """While a run is being trained, another process must be refused."""
    tools, run = equipment(setting), folder / "run"

    def try_again(_state: TrainState, _session: Session) -> None:
        open_run(run, tools, nothing)

    try:
        open_run(run, tools, try_again)
    except RunInUse:
        return []
    return ["two processes train in the same run directory"]


def flipped_bits(setting: Setting, folder: Path) -> list[str]:
    """A bit that flips in any file of the newest checkpoint: it must be skipped."""
    tools, run, problems = equipment(setting), folder / "run", []
    open_run(run, tools, saves(5, 10))
    newest = RunDir(run).checkpoints / checkpoint_name(10)
    for file in sorted(newest.iterdir()):
        healthy = file.read_bytes()
        for place in (len(healthy) // 3, len(healthy) - 2):
            file.write_bytes(healthy[:place] + bytes([healthy[place] ^ 1]) + healthy[place + 1 :])
            try:
                found = newest_valid(newest.parent, {})[0].path
            except ResmolError:
                found = newest
            if found == newest:
                problems.append(f"{file.name}: a flipped bit at byte {place} is believed")
        file.write_bytes(healthy)
    return problems


def changed_on_the_way(setting: Setting, folder: Path) -> list[str]:
    """A bit that flips between memory and file, so that the file's own hash is right: it must not be loaded."""
    tools, run = equipment(setting), folder / "run"
    real = resmol.run.checkpoint.file_sha256

    def flip(path: Path) -> str:
        if path.name == WEIGHTS:  # which was read back: the bit flips after that
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        return real(path)

    resmol.run.checkpoint.file_sha256 = flip
    open_run(run, tools, saves(5))
    resmol.run.checkpoint.file_sha256 = real
    try:
        open_run(run, tools, nothing)
    except CheckpointError as error:
        return [] if "gave other bytes for" in error.what else [f"noticed by something else: {error.what}"]
    return ["weights that were never in memory were loaded"]


def foreign_bindings(setting: Setting, folder: Path) -> list[str]:
    """The newest checkpoint is whole, and of another configuration or other data: the run must not go on from it."""
    tools, problems = equipment(setting), []
    for name in ("config_sha256", "data_fingerprint"):
        run = folder / name
        open_run(run, tools, saves(5))
        path = RunDir(run).checkpoints / checkpoint_name(5)
        opened = open_checkpoint(path)
        (path / STATE).write_text(opened.state.model_copy(update={name: "0" * 64}).model_dump_json(indent=1))
        entries = opened.manifest.files | {STATE: file_entry(path / STATE, {})}
        manifest = Manifest(step=5, parent=None, permanent=False, files=entries)
        (path / MANIFEST).write_bytes(manifest.to_bytes())
        ledger = RunDir(run).ledger
        lines = [line for line in ledger.read_bytes().splitlines(True) if b'"kind":"save"' not in line]
        ledger.write_bytes(b"".join(lines))  # as a crash just after the commit leaves it
        try:
            open_run(run, tools, nothing)
            problems.append(f"a checkpoint with another {name} was gone on from")
        except CheckFailed as error:
            problems += [] if name in error.what else [f"another {name} is refused with: {error.what}"]
    return problems


def prune_on_corruption(setting: Setting, folder: Path) -> list[str]:
    """The newest checkpoint is corrupt: no older one may be removed."""
    tools, run, problems = equipment(setting), folder / "run", []

    def script(state: TrainState, session: Session) -> None:
        keep_three(state, session)
        file = session.run.checkpoints / checkpoint_name(15) / WEIGHTS
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        with contextlib.suppress(CheckpointError):
            prune_to_1(state, session)
        names = sorted(path.name for path in list_checkpoints(session.run.checkpoints))
        if len(names) != 3:
            problems.append(f"only {names} are left, and the newest of them is corrupt")

    open_run(run, tools, script)
    return problems


def saved_meanwhile(setting: Setting, folder: Path) -> list[str]:
    """No save goes on in the background before the next step is executed; it must hold the state of its own step."""
    tools, run, problems = equipment(setting), folder / "run", []
    gone_on, steps = threading.Condition(), [0]

    def wait_for_the_next(step: int) -> None:
        with gone_on:  # healthy code never waits that long, and is not wrong if it does: the save then comes earlier
            gone_on.wait_for(lambda: steps[0] > step, timeout=5.0)

    def script(state: TrainState, session: Session) -> None:
        for step in range(1, 7):
            go_to(state, session, step)
            with gone_on:
                steps[0] = step if step < 6 else 99
                gone_on.notify_all()
            if step % 2 == 0:
                session.checkpointer._thread.submit(wait_for_the_next, step)
                save(state, session)

    open_run(run, tools, script)
    recorded = [r["step"] for r in select(read_ledger(RunDir(run).ledger).records, "save")]
    problems += [] if recorded == [2, 4, 6] else [f"the ledger knows of the saves of steps {recorded}"]
    return problems + read(run, tools, 6)[1] + values_of(run)


def values_of(run: Path) -> list[str]:
    """Look at whether each checkpoint of a run holds what was made up for its step."""
    problems = []
    for path in list_checkpoints(RunDir(run).checkpoints):
        averaged = {f"{AVERAGED}/{name}": tensor for name, tensor in load_file(path / AVERAGED).items()}
        tensors, step = {**load_file(path / WEIGHTS), **load_file(path / OPTIMIZER), **averaged}, step_of(path)
        wrong = [name for name, t in tensors.items() if not bool((t == value_of(name, step)).all())]
        problems += [f"{path.name} holds the {wrong[0]} of another step"] if wrong else []
    return problems


# --- playing them ------------------------------------------------------------------------------------------------


def play(out: Path, drill: str, *arguments: Any, **options: Any) -> int:
    """Play a drill in this child and write what it returns to ``out``, for the test to read."""
    out.write_text(json.dumps(globals()[drill](*arguments, **options)), encoding="utf-8")
    return 0
