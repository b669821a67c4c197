"""Saving while training goes on: what is written, when the ledger hears of it, and what becomes of errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import TrainTiny

from resmol import saving
from resmol.audit import audit
from resmol.certificate import write_certificate
from resmol.checkpoint import Contents
from resmol.checks import all_passed
from resmol.config import RunConfig
from resmol.distributed import Runtime
from resmol.errors import CheckpointError, DiskFull
from resmol.launch import new_state
from resmol.ledger import Ledger, Record, effective_steps, read_ledger, select
from resmol.manifest import OPTIMIZER, STATE, WEIGHTS, SavedState, list_checkpoints, load_state, read_manifest
from resmol.replay import Wish
from resmol.report import write_report
from resmol.rundir import RunDir
from resmol.saving import Saver
from resmol.train import REPRODUCIBLE_FIELDS, TrainState
from resmol.views import Journal

PATIENCE = 20.0  # seconds after which a test that hangs gives up


@dataclass
class Bench:
    """A state to save, a place for it, and a gate before which each save waits until it is opened."""

    state: TrainState
    folder: Path
    journal: Journal
    gate: threading.Event
    at_once: list[int]  # how many saves were under way whenever one began
    written: list[Contents]

    def saver(self, keep_last: int = 10, *, background: bool = True) -> Saver:
        return Saver(self.folder, keep_last, self.journal, None, background=background)

    def save(self, saver: Saver, step: int, *, wait: bool = False) -> None:
        """Fill everything with the step, and save that."""
        contents = Contents.of(self.state.model, self.state.optimizer)
        for tensors in contents.files.values():
            for tensor in tensors.values():
                tensor.fill_(float(step))
        saved = SavedState(
            step=step, tokens_seen=0, config_sha256="", data_fingerprint="", ledger_head=self.journal.head,
            random_state="", permanent=False,
        )  # fmt: skip
        saver.save(saved, contents, wait=wait)

    def save_and(self, then: Callable[[Saver], object]) -> None:
        """Save step 5, do something, and leave."""
        with self.saver() as saver:
            self.save(saver, 5)
            then(saver)

    def saves(self) -> list[int]:
        return [record["step"] for record in select(self.journal.records, "save")]


@pytest.fixture
def bench(tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    state = new_state(tiny_config, Runtime(0, 1, torch.device("cpu"), None))
    for parameter in state.model.parameters():
        moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        state.optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    made = Bench(state, folder, Journal(Ledger(tmp_path / "ledger.jsonl"), ()), threading.Event(), [], [])
    genuine, under_way = saving.save_checkpoint, []

    def behind_the_gate(folder: Path, saved: SavedState, contents: Contents, **options: Any) -> Any:
        under_way.append(saved.step)
        made.at_once.append(len(under_way))
        made.written.append(contents)
        assert made.gate.wait(PATIENCE)
        try:
            return genuine(folder, saved, contents, **options)
        finally:
            under_way.remove(saved.step)

    monkeypatch.setattr(saving, "save_checkpoint", behind_the_gate)
    yield made
    made.gate.set()
    made.journal.close()


def values_in(path: Path) -> set[float]:
    return {
        value for file in (WEIGHTS, OPTIMIZER) for t in load_file(path / file).values() for value in t.unique().tolist()
    }


def test_a_save_is_of_the_moment_that_it_was_asked_for(bench: Bench) -> None:
    """Weights, moments and the ledger's head are those of step 5, whatever happens before they are on the disk."""
    bench.journal.write("warn", what="step 5")
    head = bench.journal.head
    with bench.saver() as saver:
        bench.save(saver, 5)
        bench.journal.write("warn", what="step 6")
        for tensors in Contents.of(bench.state.model, bench.state.optimizer).files.values():
            for tensor in tensors.values():
                tensor.fill_(6.0)
        bench.gate.set()
    path = bench.folder / "step-00000005"
    assert values_in(path) == {5.0}
    assert load_state(path)[0].ledger_head == head


def test_the_ledger_hears_of_it_when_it_is_durable(bench: Bench) -> None:
    with bench.saver() as saver:
        bench.save(saver, 5)
        saver.settle(wait=False)
        assert (bench.saves(), list_checkpoints(bench.folder)) == ([], [])
        bench.journal.write("warn", what="training goes on")
        bench.gate.set()
        saver.settle(wait=True)
        assert [record["kind"] for record in bench.journal.records] == ["warn", "save"]
        assert bench.journal.records[-1]["manifest_sha256"] == read_manifest(bench.folder / "step-00000005").sha256
    assert bench.saves() == [5]


def test_at_most_one_is_on_its_way(bench: Bench) -> None:
    bench.gate.set()
    with bench.saver() as saver:
        for step in range(1, 9):
            bench.save(saver, step)
    assert bench.at_once == [1] * 8
    assert bench.saves() == list(range(1, 9))
    manifests = [read_manifest(path) for path in reversed(list_checkpoints(bench.folder))]
    assert [m.parent for m in manifests] == [None, *(m.sha256 for m in manifests[:-1])]
    assert [values_in(path) for path in list_checkpoints(bench.folder)] == [{float(step)} for step in range(8, 0, -1)]


def test_the_copy_is_always_in_the_same_memory(bench: Bench) -> None:
    bench.gate.set()
    with bench.saver() as saver:
        for step in (1, 2):
            bench.save(saver, step)
    places = [[t.data_ptr() for file in c.files.values() for t in file.values()] for c in bench.written]
    live = Contents.of(bench.state.model, bench.state.optimizer)
    assert places[0] == places[1]
    assert not {*places[0]} & {t.data_ptr() for file in live.files.values() for t in file.values()}


@pytest.mark.parametrize(("background", "wait"), [(True, True), (False, False), (False, True)])
def test_a_save_that_is_waited_for_is_durable_and_needs_no_copy(bench: Bench, background: bool, wait: bool) -> None:
    bench.gate.set()
    with bench.saver(background=background) as saver:
        bench.save(saver, 5, wait=wait)
        assert bench.saves() == [5]
        assert values_in(bench.folder / "step-00000005") == {5.0}
        weight = next(iter(bench.written[0].files[WEIGHTS].values()))
        assert weight.data_ptr() == next(iter(bench.state.model.state_dict().values())).data_ptr()


def broken(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_errors_surface_in_the_training_thread(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_the_next_step(saver: Saver) -> None:
        while True:
            saver.settle(wait=False)

    def at_the_next_save(saver: Saver) -> None:
        bench.save(saver, 6)

    def at_the_end(_: Saver) -> None:
        pass

    monkeypatch.setattr(saving, "save_checkpoint", broken(OSError(5, "the disk is broken")))
    for moment in (at_the_next_step, at_the_next_save, at_the_end):
        with pytest.raises(OSError, match="the disk is broken"):
            bench.save_and(moment)
    assert bench.saves() == []


def test_a_full_disk_is_recorded_also_when_pruning_did_not_help(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.gate.set()
    with bench.saver() as saver:
        for step in (1, 2):
            bench.save(saver, step, wait=True)
        monkeypatch.setattr(saving, "save_checkpoint", broken(DiskFull("no room", fix="")))
        with pytest.raises(DiskFull) as stopped:
            bench.save(saver, 3, wait=True)
    assert stopped.value.exit_code == 28
    assert [record["removed"] for record in select(bench.journal.records, "warn")] == [["step-00000001"]]


def test_leaving_waits_for_it_also_after_an_error(bench: Bench) -> None:
    threading.Timer(0.05, bench.gate.set).start()
    with pytest.raises(ZeroDivisionError):
        bench.save_and(lambda _: 1 / 0)
    assert bench.saves() == [5]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("saver")]


def test_of_two_errors_the_first_is_raised_and_both_are_recorded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "save_checkpoint", broken(OSError(5, "the disk is broken")))
    with pytest.raises(ZeroDivisionError):
        bench.save_and(lambda _: 1 / 0)
    warning = bench.journal.records[-1]
    assert warning["what"] == "a checkpoint was not written"
    assert "the disk is broken" in warning["reason"]


def test_older_ones_go_after_the_new_one_was_recorded_and_read_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.gate.set()
    genuine, recorded = saving.prune, []

    def prune(folder: Path, keep_last: int) -> list[str]:
        recorded.append((threading.current_thread() is threading.main_thread(), bench.saves()))
        return genuine(folder, keep_last)

    monkeypatch.setattr(saving, "prune", prune)
    with bench.saver(keep_last=2) as saver:
        for step in (1, 2, 3):
            bench.save(saver, step)
        saver.settle(wait=True)
        assert recorded == [(False, [1]), (False, [1, 2]), (False, [1, 2, 3])]
        assert [path.name for path in list_checkpoints(bench.folder)] == ["step-00000003", "step-00000002"]
        monkeypatch.setattr(saving, "prune", lambda *a: damage_and_prune(genuine, *a))
        with pytest.raises(CheckpointError):
            bench.save(saver, 4, wait=True)
    assert len(list_checkpoints(bench.folder)) == 3


def damage_and_prune(genuine: Callable[..., list[str]], folder: Path, keep_last: int) -> list[str]:
    (list_checkpoints(folder)[0] / STATE).write_bytes(b"{}")
    return genuine(folder, keep_last)


# --- in a run ----------------------------------------------------------------------------------------------------


class Watch:
    """A view that lets each save go on only when two more steps are recorded, and knows who writes records."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
        self.step, self.changed, self.threads = 0, threading.Condition(), set[threading.Thread]()
        genuine = saving.save_checkpoint

        def late(folder: Path, saved: SavedState, *arguments: Any, **options: Any) -> Any:
            with self.changed:
                assert self.changed.wait_for(lambda: self.step >= min(saved.step + 2, last), PATIENCE)
            return genuine(folder, saved, *arguments, **options)

        monkeypatch.setattr(saving, "save_checkpoint", late)

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
    train_tiny(tmp_path / "off", 23, "checkpoint.background=off")
    watch = Watch(monkeypatch, 23)
    state = train_tiny(tmp_path / "on", 23, "checkpoint.background=on", views=lambda _: [watch])
    assert history(tmp_path / "on") == history(tmp_path / "off")
    assert len(history(tmp_path / "on")[1]) == 5 * 4
    assert watch.threads == {threading.main_thread()}
    records = read_ledger(tmp_path / "on" / "ledger.jsonl").records
    assert state.parent == [record["manifest_sha256"] for record in select(records, "save")][-1]


def test_whoever_reads_the_record_copes_with_late_saves(
    tmp_path: Path, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Audit with replay, certificate, report and resumption, of a ledger in which saves follow later steps."""
    path = tmp_path / "run"
    for last in (13, 20):
        with monkeypatch.context() as patch:
            watch = Watch(patch, last)
            wanted = ("checkpoint.background=on", "checkpoint.permanent=[7]", "checkpoint.keep_last=2")
            train_tiny(path, last, *wanted, views=lambda _, w=watch: [w])
    run, records = RunDir(path), read_ledger(path / "ledger.jsonl").records
    before = {
        r["step"]: max(s["step"] for s in records[: r["seq"]] if s["kind"] == "step") for r in select(records, "save")
    }
    assert all(before[step] >= min(step + 2, 13 if step <= 13 else 20) for step in before), before
    assert set(before) == {5, 7, 10, 13, 15, 20}
    checks = audit(run, strict=True, wish=Wish(count=3))
    assert all_passed(checks), [check for check in checks if not check.passed]
    assert "restarts" in Path(write_certificate(run, checks)).read_text(encoding="utf-8")
    assert "step-00000007" in write_report(run).read_text(encoding="utf-8")
