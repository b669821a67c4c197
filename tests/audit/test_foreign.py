"""Runs of the real Trainer, resumed rightly and with the mistakes that people make; and histories that were edited."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_runs
import transformers
from safetensors.torch import load_file, save_file

from resmol.__main__ import run as command
from resmol.audit.foreign.audit import audit_foreign
from resmol.checks import Checks
from resmol.errors import DataError, UsageError

STOP, END = 30, 60
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first process ended at step 30; its epochs have 24 steps."""
    folder = tmp_path_factory.mktemp("trainer") / "first"
    trainer_runs.train(folder, STOP)
    return folder


@pytest.fixture(scope="module")
def right(first: Path) -> Path:
    return resumed(first, first.with_name("right"))


def resumed(first: Path, folder: Path, before: Callable[[Path], None] = lambda _: None, **given: Any) -> Path:
    """Return a copy of a run that another process took to step 60, after ``before`` was done to its checkpoint."""
    shutil.copytree(first, folder)
    before(folder / f"checkpoint-{STOP}")
    trainer_runs.train(folder, END, resume=folder / f"checkpoint-{STOP}", **given)
    return folder


def failed(checks: Checks) -> dict[str, str]:
    return {check.name: check.measured for check in checks if not check.passed}


def measured(checks: Checks, name: str) -> str:
    return next(check.measured for check in checks if check.name == name)


def without(*names: str) -> Callable[[Path], None]:
    return lambda checkpoint: [(checkpoint / name).unlink() for name in names] and None  # type: ignore[return-value]


def other_weights(checkpoint: Path) -> None:
    fresh, path = trainer_runs.model().state_dict(), checkpoint / WEIGHTS
    save_file({name: fresh[name] for name in load_file(path)}, path, metadata={"format": "pt"})


def test_a_run_that_was_resumed_rightly_passes(right: Path) -> None:
    checks = audit_foreign(right)
    assert failed(checks) == {}
    assert measured(checks, "learning rate") == "0.005, 5 steps of warm-up, linear to 0 at step 60, in 30 logged steps"
    assert measured(checks, "data position") == "about 24 steps an epoch, 1,920 tokens seen"
    assert "optimizer.pt, rng_state.pth, scheduler.pt, training_args.bin" in measured(checks, "not read")


MISTAKES: dict[str, tuple[Callable[[Path], None], dict[str, Any], dict[str, str]]] = {
    "without the optimizer's state": (
        without("optimizer.pt", "scheduler.pt"), {},
        {"learning rate": "0.001 at step 32 instead of 0.00263636 (0.005, 5 steps of warm-up, linear to 0 at step "
                          "60); the schedule started anew after checkpoint-30"},
    ),
    "the data from the beginning of the epoch": (
        without(), {"ignore_data_skip": True},
        {"data position": "from step 30 to 32 the epoch goes from 1.25 to 1.083: data of 6 steps repeated"},
    ),
    "another data set": (
        without(), {"rows": 80},
        {"data position": "from step 30 to 32 the epoch goes from 1.25 to 1.6: data of 6.4 steps skipped, or ano"},
    ),
    "another horizon": (
        without(), {"max_steps": 100},
        {"plan": "max_steps is 60 in checkpoint-30 and 100 in checkpoint-40",
         "learning rate": "0.00363158 at step 32 instead of 0.00263636 (0.005, 5 steps of warm-up, linear to 0 at "
                          "step 60); from there on it is the schedule of 100 planned steps, not 60"},
    ),
    "most weights frozen": (
        without("optimizer.pt"), {"frozen": True},
        {"learning rate": "0.001 at step 32 instead",
         "weights": "7 tensors did not change from checkpoint-30 to checkpoint-40, and did before: model.layers.0."},
    ),
    "other weights": (
        other_weights, {}, {"loss at checkpoints": "after checkpoint-30 the loss rises from 3.355 (step 30) to 4."},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_at_a_resume_is_found_and_named(first: Path, tmp_path: Path, name: str) -> None:
    before, given, expected = MISTAKES[name]
    found = failed(audit_foreign(resumed(first, tmp_path / "run", before, **given)))
    assert found.keys() == expected.keys()
    assert [found[row][: len(text)] for row, text in expected.items()] == list(expected.values())


def test_uneven_epochs_and_a_crash_are_no_mistakes(tmp_path: Path) -> None:
    """Of 24 micro-batches, five a step, the last step of an epoch has four; 23 steps, of which 3 were lost."""
    folder = tmp_path / "run"
    given = {"gradient_accumulation_steps": 5, "logging_steps": 3, "lr_scheduler_type": "cosine", "max_steps": 36}
    trainer_runs.train(folder, 23, **given)
    trainer_runs.train(folder, 36, resume=folder / "checkpoint-20", **given)
    assert failed(audit_foreign(folder)) == {}


# --- what was edited ----------------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[list[dict[str, Any]]], Any], *steps: int) -> None:
    """Change the history in the states of some checkpoints, in all of them by default."""
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        if not steps or int(path.parent.name.partition("-")[2]) in steps:
            state = json.loads(path.read_text())
            with suppress(IndexError):  # of a state that is older than what is changed
                change(state["log_history"])
            path.write_text(json.dumps(state))


def not_a_number(folder: Path) -> None:
    path = folder / "checkpoint-60" / WEIGHTS
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


EDITS: dict[str, tuple[Callable[[Path], Any], dict[str, str]]] = {
    "a better loss in the newest state": (
        lambda folder: edit(folder, lambda history: history[9].update(loss=3.5), END),
        {"one history": "checkpoint-50 and checkpoint-60 tell different things of step 20"},
    ),
    "steps left out": (
        lambda folder: edit(folder, lambda history: history.__delitem__(slice(2, 4))),
        {"steps": "2 steps missing: 6, 8"},
    ),
    "a step twice": (
        lambda folder: edit(folder, lambda history: history.insert(4, history[3])),
        {"steps": "step 8 is logged 2 times"},
    ),
    "started anew in the same folder": (
        lambda folder: edit(folder, lambda history: history.__delitem__(slice(None, 15)), 40, 50, 60),
        {"one history": "checkpoint-40 has another history than checkpoint-30 from the first entry on: another run"},
    ),
    "another rate at one step": (
        lambda folder: edit(folder, lambda history: history[6].update(learning_rate=1.0)),
        {"learning rate": "1 at step 14 instead of 0.00427273 (0.005, 5 steps of warm-up, linear to 0 at step 60)"},
    ),
    "an infinite norm": (
        lambda folder: edit(folder, lambda history: history[3].update(grad_norm=float("inf"))),
        {"finite numbers": "step 8: grad_norm inf"},
    ),
    "a renamed checkpoint": (
        lambda folder: (folder / "checkpoint-60").rename(folder / "checkpoint-70"),
        {"checkpoints": "checkpoint-70 holds the state of step 60"},
    ),
    "a copied checkpoint": (
        lambda folder: shutil.copy(folder / "checkpoint-40" / WEIGHTS, folder / "checkpoint-50" / WEIGHTS),
        {"weights": "no weight changed from checkpoint-40 to checkpoint-50"},
    ),
    "half a file of weights": (
        lambda folder: (folder / "checkpoint-50" / WEIGHTS).write_bytes(b"\x80\x04"),
        {"weights": "checkpoint-50: "},
    ),
    "a weight that is no number": (not_a_number, {"weights": "checkpoint-60: model.norm.weight not finite"}),
    "no state": (
        lambda folder: (folder / "checkpoint-50/trainer_state.json").unlink(),
        {"checkpoints": "checkpoint-50: there is no trainer_state.json"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_run_is_found(right: Path, tmp_path: Path, name: str) -> None:
    change, expected = EDITS[name]
    shutil.copytree(right, tmp_path / "run")
    change(tmp_path / "run")
    found = failed(audit_foreign(tmp_path / "run"))
    assert found.keys() == expected.keys()
    assert [found[row][: len(text)] for row, text in expected.items()] == list(expected.values())


# --- schedules, made by transformers itself -----------------------------------------------------------------


def history_of(
    folder: Path,
    kind: str,
    warmup: int,
    *,
    steps: int = 100,
    late: int = 1,
    skipped: tuple[int, ...] = (),
    **options: Any,
) -> Path:
    """Write a state whose learning rates are those of a schedule of transformers, which some steps did not advance."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = transformers.get_scheduler(kind, optimizer, warmup, steps, scheduler_specific_kwargs=options or None)
    rates = [scheduler.get_last_lr()[0]]
    for step in range(1, steps + 1):
        optimizer.step()
        if step not in skipped:
            scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    logged = range(5, steps + 1, 5)
    history = [{"step": step, "loss": 1.0, "learning_rate": rates[step - late], "epoch": step / 40} for step in logged]
    state = {"global_step": steps, "max_steps": steps, "logging_steps": 5, "log_history": history}
    (folder / f"checkpoint-{steps}").mkdir()
    (folder / f"checkpoint-{steps}" / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("linear", 0, "linear to 0 at step 100, its warm-up cannot be told"),
        ("linear", 13, "0.0003, 13 steps of warm-up, linear to 0 at step 100"),
        ("cosine", 20, "0.0003, 20 steps of warm-up, cosine to 0 at step 100"),
        ("constant_with_warmup", 31, "0.0003, 31 steps of warm-up, constant_with_warmup"),
    ],
)
def test_schedules_are_recognized(tmp_path: Path, kind: str, warmup: int, expected: str, late: int) -> None:
    checks = audit_foreign(history_of(tmp_path, kind, warmup, late=late))
    assert measured(checks, "learning rate") == f"{expected}, in 20 logged steps"
    assert failed(audit_foreign(tmp_path, [f"lr_scheduler_type={kind}", f"warmup_steps={warmup}"])) == {}
    assert failed(audit_foreign(tmp_path, [f"lr_scheduler_type={kind}", "learning_rate=2e-4"])).keys() == {
        "learning rate"
    }


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_steps_that_float16_skipped_are_no_mistake(tmp_path: Path, kind: str) -> None:
    checks = audit_foreign(history_of(tmp_path, kind, 20, skipped=(1, 2, 13, 57)))
    assert failed(checks) == {}
    behind = 1 + (3 if kind == "constant_with_warmup" else 4)  # which shows nothing after its warm-up
    assert f"at the end {behind} steps behind" in measured(checks, "learning rate")


@pytest.mark.parametrize(
    ("kind", "options"),
    [("polynomial", {}), ("inverse_sqrt", {}), ("warmup_stable_decay", {"num_decay_steps": 30}),
     ("cosine_with_restarts", {"num_cycles": 3})],
)  # fmt: skip
def test_other_schedules_are_not_judged(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    checks = audit_foreign(history_of(tmp_path, kind, 10, **options))
    assert failed(checks) == {}
    assert "none of linear, cosine, constant, constant_with_warmup" in measured(checks, "learning rate")
    assert failed(audit_foreign(tmp_path, ["lr_scheduler_type=linear"])).keys() == {"learning rate"}


# --- what else a folder can hold ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "nonsense", '{"global_step": 1, "log_history": 3}', '{"global_step": true, "log_history": []}',
     '{"global_step": 1, "log_history": [1]}', "[" * 100_000],
)  # fmt: skip
def test_what_is_no_state(tmp_path: Path, content: str) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(content)
    with pytest.raises(DataError, match=r"no state of a transformers Trainer: checkpoint-1: trainer_state\.json"):
        audit_foreign(tmp_path)


def test_odd_entries_are_no_crash(tmp_path: Path) -> None:
    odd = [
        {},
        {"loss": "x", "step": 1},
        {"loss": None, "step": 2, "epoch": []},
        {"loss": 1, "step": "3"},
        {"eval_loss": 1},
    ]
    state = {"global_step": 5, "max_steps": "x", "logging_steps": 0.5, "epoch": None, "log_history": odd}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert failed(audit_foreign(tmp_path)) == {}


def test_the_command(right: Path, tmp_path: Path, capsys: Any) -> None:
    assert command(["audit", "--foreign", str(right), "--json"], debug=False) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    assert command(["audit", str(right), "--foreign", "--trainer-arg", "lr_scheduler_type=cosine"], debug=False) == 1
    assert command(["audit", "--foreign", str(tmp_path)], debug=False) == 3
    for words in (["--foreign", "--strict"], ["--trainer-arg", "max_steps=3"]):
        assert command(["audit", str(right), *words], debug=False) == 2
    for argument in ("lr=1", "lr_scheduler_type=polynomial", "warmup_steps=-1", "max_steps"):
        with pytest.raises(UsageError, match="is not understood"):
            audit_foreign(right, [argument])
