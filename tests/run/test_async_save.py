"""Saving while training goes on: what is written, when the ledger hears of it, and what becomes of errors."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import TrainTiny

from resmol.audit.audit import audit
from resmol.audit.certificate import write_certificate
from resmol.audit.replay import ReplayOptions
from resmol.audit.report import write_report
from resmol.checks import all_passed
from resmol.config.run_config import RunConfig
from resmol.errors import CheckpointError, DiskFull
from resmol.run import async_save as saving
from resmol.run.async_save import AsyncCheckpointer
from resmol.run.checkpoint import CheckpointTensors, StagedCheckpoint, allocate_moments
from resmol.run.checkpoint_manifest import (
    OPTIMIZER,
    STATE,
    WEIGHTS,
    SavedState,
    list_checkpoints,
    open_checkpoint,
    read_manifest,
)
from resmol.run.directory import RunDir
from resmol.run.ledger import Ledger, Record, effective_steps, read_ledger, select
from resmol.run.log_writers import RunLog
from resmol.run.ranks import Ranks
from resmol.train.build import new_state
from resmol.train.parallel import Runtime
from resmol.train.step import TrainState
from resmol.train.step_result import REPRODUCIBLE_FIELDS

NAMES = ("stage_checkpoint", "commit_checkpoint")
PATIENCE = 300.0  # seconds after which a test that hangs gives up


@dataclass
class Bench:
    """A state to save, a place for it, and a gate: nothing happens in the background before it is opened."""

    config: RunConfig
    state: TrainState
    folder: Path
    run_log: RunLog
    gate: threading.Event
    threads: list[tuple[str, threading.Thread]]  # who wrote, and who committed

    def checkpointer(self, keep_last: int = 10) -> AsyncCheckpointer:
        config = self.config.replace({"checkpoint.keep_last": keep_last})
        checkpointer = AsyncCheckpointer(self.folder, config, self.run_log, None)
        checkpointer._thread.submit(self.gate.wait, PATIENCE)
        return checkpointer

    def fill(self, value: float) -> None:
        for tensors in CheckpointTensors.of(self.state.model, self.state.optimizer).files.values():
            for tensor in tensors.values():
                tensor.fill_(value)

    def save(self, checkpointer: AsyncCheckpointer, step: int, *, wait: bool = False, permanent: bool = False) -> None:
        """Fill everything with the step, and save that."""
        self.fill(float(step))
        saved = SavedState(
            step=step, tokens_seen=0, windows_seen=0, config_sha256="", data_fingerprint="",
            ledger_head=self.run_log.head, random_state="", permanent=permanent,
        )  # fmt: skip
        checkpointer.save(saved, CheckpointTensors.of(self.state.model, self.state.optimizer), wait=wait)

    def save_and(self, then: Callable[[AsyncCheckpointer], object]) -> None:
        """Save step 5, do something, and leave."""
        with self.checkpointer() as checkpointer:
            self.save(checkpointer, 5)
            then(checkpointer)

    def saves(self) -> list[int]:
        return [record["step"] for record in select(self.run_log.records, "save")]

    def warnings(self) -> list[Record]:
        return list(select(self.run_log.records, "warn"))


@pytest.fixture
def bench(tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    state = new_state(tiny_config, Runtime.single())
    allocate_moments(state.optimizer, 1)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    made = Bench(tiny_config, state, folder, RunLog(Ledger(tmp_path / "ledger.jsonl"), ()), threading.Event(), [])
    for name in NAMES:
        monkeypatch.setattr(saving, name, noting(made.threads, name, getattr(saving, name)))
    yield made
    made.gate.set()
    made.run_log.close()


def noting(threads: list[tuple[str, threading.Thread]], name: str, genuine: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any, **options: Any) -> Any:
        threads.append((name, threading.current_thread()))
        return genuine(*arguments, **options)

    return called


def values_in(path: Path) -> set[float]:
    return {
        value for file in (WEIGHTS, OPTIMIZER) for t in load_file(path / file).values() for value in t.unique().tolist()
    }


def test_a_save_is_of_the_moment_that_it_was_asked_for(bench: Bench) -> None:
    """Weights, moments and the ledger's head are those of step 5, whatever happens before they are on the disk."""
    bench.run_log.write("warn", what="step 5")
    head = bench.run_log.head
    with bench.checkpointer() as checkpointer:
        bench.save(checkpointer, 5)
        bench.run_log.write("warn", what="step 6")
        bench.fill(6.0)
        bench.gate.set()
    path = bench.folder / "step-00000005"
    assert values_in(path) == {5.0}
    assert open_checkpoint(path).state.ledger_head == head


def test_the_ledger_hears_of_it_when_it_is_durable(bench: Bench) -> None:
    with bench.checkpointer() as checkpointer:
        bench.save(checkpointer, 5)
        checkpointer.poll()
        assert (bench.saves(), list_checkpoints(bench.folder)) == ([], [])
        bench.run_log.write("warn", what="training goes on")
        bench.gate.set()
        checkpointer.wait_until_finished()
        assert [record["kind"] for record in bench.run_log.records] == ["warn", "save"]
        assert bench.run_log.records[-1]["manifest_sha256"] == read_manifest(bench.folder / "step-00000005").sha256
    assert bench.saves() == [5]


def test_at_most_one_is_on_its_way(bench: Bench) -> None:
    bench.gate.set()
    with bench.checkpointer() as checkpointer:
        for step in range(1, 9):
            bench.save(checkpointer, step)
    assert [name for name, _ in bench.threads] == [*NAMES] * 8
    assert bench.saves() == list(range(1, 9))
    manifests = [read_manifest(path) for path in reversed(list_checkpoints(bench.folder))]
    assert [m.parent for m in manifests] == [None, *(m.sha256 for m in manifests[:-1])]
    assert [values_in(path) for path in list_checkpoints(bench.folder)] == [{float(step)} for step in range(8, 0, -1)]


def test_the_step_writes_and_the_background_makes_it_durable(bench: Bench) -> None:
    bench.gate.set()
    with bench.checkpointer() as checkpointer:
        bench.save(checkpointer, 1)
        bench.save(checkpointer, 2, wait=True)
    writing, committing = ({thread for name, thread in bench.threads if name == one} for one in NAMES)
    assert writing == {threading.main_thread()}
    assert len(committing) == 1
    assert not committing & writing


def test_a_save_that_is_waited_for_is_durable(bench: Bench) -> None:
    bench.gate.set()
    with bench.checkpointer() as checkpointer:
        bench.save(checkpointer, 5, wait=True)
        assert bench.saves() == [5]
        assert values_in(bench.folder / "step-00000005") == {5.0}


def test_when_to_save(bench: Bench) -> None:
    bench.gate.set()
    bench.config = bench.config.replace({"checkpoint.every": 4, "checkpoint.permanent": (7, 9), "train.steps": 10})
    with bench.checkpointer() as checkpointer:
        assert [step for step in range(1, 11) if checkpointer.should_save(step)] == [4, 7, 8, 9, 10]
    bench.config = bench.config.replace({"checkpoint.every": 0, "checkpoint.permanent": ()})
    with bench.checkpointer() as checkpointer:
        assert [step for step in range(1, 11) if checkpointer.should_save(step)] == [10]


def broken(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_errors_surface_in_the_training_thread(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_the_next_step(checkpointer: AsyncCheckpointer) -> None:
        while True:
            checkpointer.poll()

    def at_the_next_save(checkpointer: AsyncCheckpointer) -> None:
        bench.save(checkpointer, 6)

    def at_the_end(_: AsyncCheckpointer) -> None:
        pass

    bench.gate.set()
    monkeypatch.setattr(saving, "commit_checkpoint", broken(OSError(5, "the disk is broken")))
    for moment in (at_the_next_step, at_the_next_save, at_the_end):
        with pytest.raises(OSError, match="the disk is broken"):
            bench.save_and(moment)
    assert bench.saves() == []


FULL = DiskFull("no room", fix="")


def test_a_full_disk_is_recorded_also_when_pruning_did_not_help(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.gate.set()
    with bench.checkpointer() as checkpointer:
        for step in (1, 2):
            bench.save(checkpointer, step, wait=True)
        monkeypatch.setattr(saving, "stage_checkpoint", broken(FULL))
        with pytest.raises(DiskFull) as stopped:
            bench.save(checkpointer, 3)
    assert stopped.value.exit_code == 28
    assert [record["removed"] for record in bench.warnings()] == [["step-00000001"]]


def full(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Let the disk be full when the checkpoints of these steps are synced."""
    genuine = saving.commit_checkpoint

    def commit(staged: StagedCheckpoint, ranks: Ranks) -> Any:
        if staged.manifest.step in steps:
            shutil.rmtree(staged.temporary)
            raise FULL
        return genuine(staged, ranks)

    monkeypatch.setattr(saving, "commit_checkpoint", commit)


def test_a_disk_that_is_full_only_in_the_background_is_met_by_saving_the_next_step(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.gate.set()
    full(monkeypatch, 3)
    with bench.checkpointer() as checkpointer:
        for step in (1, 2, 3):
            bench.save(checkpointer, step)
        checkpointer.wait_until_finished()
        assert checkpointer.retry_pending
        assert checkpointer.should_save(4)
        assert [path.name for path in list_checkpoints(bench.folder)] == ["step-00000002"]
        assert [record["removed"] for record in bench.warnings()] == [["step-00000001"]]
        bench.save(checkpointer, 4)
        checkpointer.wait_until_finished()
        assert not checkpointer.retry_pending
    assert bench.saves() == [1, 2, 4]
    assert values_in(bench.folder / "step-00000004") == {4.0}


def test_a_full_disk_is_an_error_when_the_retry_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_again(checkpointer: AsyncCheckpointer) -> None:
        bench.save(checkpointer, 6)
        checkpointer.wait_until_finished()

    def no_further_save(_: AsyncCheckpointer) -> None:
        pass

    bench.gate.set()
    full(monkeypatch, 5, 6)
    for moment in (full_again, no_further_save):
        with pytest.raises(DiskFull):
            bench.save_and(moment)
    assert bench.saves() == []


def test_a_permanent_checkpoint_has_no_replacement(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.gate.set()
    full(monkeypatch, 5)
    with bench.checkpointer() as checkpointer:
        bench.save(checkpointer, 5, permanent=True)
        with pytest.raises(DiskFull):
            checkpointer.wait_until_finished()
        assert not checkpointer.retry_pending


@pytest.mark.parametrize("permanent", [False, True])
def test_a_checkpoint_that_is_waited_for_is_written_again_at_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, permanent: bool
) -> None:
    bench.gate.set()
    genuine, left = saving.commit_checkpoint, [FULL]

    def full_once(staged: StagedCheckpoint, ranks: Ranks) -> Any:
        if left:
            raise left.pop()
        return genuine(staged, ranks)

    monkeypatch.setattr(saving, "commit_checkpoint", full_once)
    with bench.checkpointer() as checkpointer:
        bench.save(checkpointer, 5, wait=True, permanent=permanent)
        assert (bench.saves(), checkpointer.retry_pending) == ([5], False)


def test_leaving_waits_for_it_also_after_an_error(bench: Bench) -> None:
    threading.Timer(0.05, bench.gate.set).start()
    with pytest.raises(ZeroDivisionError):
        bench.save_and(lambda _: 1 / 0)
    assert bench.saves() == [5]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpointer")]


def test_of_two_errors_the_first_is_raised_and_both_are_recorded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.gate.set()
    monkeypatch.setattr(saving, "commit_checkpoint", broken(OSError(5, "the disk is broken")))
    with pytest.raises(ZeroDivisionError):
        bench.save_and(lambda _: 1 / 0)
    warning = bench.run_log.records[-1]
    assert warning["what"] == "a checkpoint was not written"
    assert "the disk is broken" in warning["reason"]


def test_older_ones_go_after_the_new_one_was_recorded_and_read_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.gate.set()
    genuine, recorded = saving.prune, []

    def prune(folder: Path, keep_last: int, keep: Collection[int]) -> list[str]:
        recorded.append((threading.current_thread() is threading.main_thread(), bench.saves()))
        return genuine(folder, keep_last, keep)

    monkeypatch.setattr(saving, "prune", prune)
    with bench.checkpointer(keep_last=2) as checkpointer:
        for step in (1, 2, 3):
            bench.save(checkpointer, step)
        checkpointer.wait_until_finished()
        assert recorded == [(False, [1]), (False, [1, 2]), (False, [1, 2, 3])]
        assert [path.name for path in list_checkpoints(bench.folder)] == ["step-00000003", "step-00000002"]
        monkeypatch.setattr(saving, "prune", lambda *a: damage_and_prune(genuine, *a))
        with pytest.raises(CheckpointError):
            bench.save(checkpointer, 4, wait=True)
    assert len(list_checkpoints(bench.folder)) == 3


def damage_and_prune(genuine: Callable[..., list[str]], folder: Path, *arguments: Any) -> list[str]:
    (list_checkpoints(folder)[0] / STATE).write_bytes(b"{}")
    return genuine(folder, *arguments)


# --- in a run ----------------------------------------------------------------------------------------------------


class Watch:
    """A log writer that lets each commit go on only when two more steps are recorded, and notes who writes records."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
        self.step, self.changed, self.threads = 0, threading.Condition(), set[threading.Thread]()
        genuine = saving.commit_checkpoint

        def late(staged: StagedCheckpoint, ranks: Ranks) -> Any:
            with self.changed:
                assert self.changed.wait_for(lambda: self.step >= min(staged.manifest.step + 2, last), PATIENCE)
            return genuine(staged, ranks)

        monkeypatch.setattr(saving, "commit_checkpoint", late)

    def show(self, record: Record) -> None:
        self.threads.add(threading.current_thread())
        if record["kind"] == "step":
            with self.changed:
                self.step = record["step"]
                self.changed.notify_all()

    def close(self) -> None:
        pass


def history(run: Path) -> tuple[dict[int, list[Any]], list[tuple[str, dict[str, str]]]]:
    """Return what must be equal, bit for bit: the fields of each step, and every tensor of each checkpoint."""
    steps = effective_steps(read_ledger(run / "ledger.jsonl").records)
    manifests = [read_manifest(path) for path in list_checkpoints(run / "checkpoints")]
    tensors = [(f"{m.step} {file}", entry.tensors) for m in manifests for file, entry in m.files.items()]
    return {step: [record[name] for name in REPRODUCIBLE_FIELDS] for step, record in steps.items()}, tensors


def test_a_run_with_late_saves_is_the_run_without(
    tmp_path: Path, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tiny(tmp_path / "prompt", 23)
    watch = Watch(monkeypatch, 23)
    train_tiny(tmp_path / "late", 23, log_writers=lambda _: [watch])
    assert history(tmp_path / "late") == history(tmp_path / "prompt")
    assert len(history(tmp_path / "late")[1]) == 5 * 4
    assert watch.threads == {threading.main_thread()}


def test_whoever_reads_the_record_copes_with_late_saves(
    tmp_path: Path, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Audit with replay, certificate, report and resumption, of a ledger in which saves follow later steps."""
    path = tmp_path / "run"
    for last in (13, 20):
        with monkeypatch.context() as patch:
            watch = Watch(patch, last)
            wanted = ("checkpoint.permanent=[7]", "checkpoint.keep_last=2")
            train_tiny(path, last, *wanted, log_writers=lambda _, w=watch: [w])
    run, records = RunDir(path), read_ledger(path / "ledger.jsonl").records
    before = {
        r["step"]: max(s["step"] for s in records[: r["seq"]] if s["kind"] == "step") for r in select(records, "save")
    }
    assert all(before[step] >= min(step + 2, 13 if step <= 13 else 20) for step in before), before
    assert set(before) == {5, 7, 10, 13, 15, 20}
    checks = audit(run, strict=True, replay_options=ReplayOptions(count=3))
    assert all_passed(checks), [check for check in checks if not check.passed]
    assert "restarts" in Path(write_certificate(run, checks)).read_text(encoding="utf-8")
    assert "step-00000007" in write_report(run).read_text(encoding="utf-8")


def test_a_run_whose_disk_is_full_in_the_background_saves_at_the_next_step(
    tmp_path: Path, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(monkeypatch, 10)
    train_tiny(tmp_path / "run", 13)
    records = read_ledger(tmp_path / "run" / "ledger.jsonl").records
    saves = [record["step"] for record in select(records, "save")]
    assert (saves[0], saves[-1]) == (5, 13)
    assert {11, 12, 13} & {*saves}
    assert 10 not in saves
    assert [record["what"] for record in select(records, "warn")] == ["disk full: older checkpoints pruned"]
