"""Averaged weights: a closed form, a training that does not notice them, resumption, and who may ask for them."""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume import Crash, Hook, assert_equal_runs, bits, die, history
from tiny import TrainTiny

from resmol.audit.audit import audit
from resmol.audit.replay import ReplayOptions
from resmol.checks import all_passed
from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.errors import CheckpointError, ConfigError, DataError, UsageError
from resmol.interop.evaluate import evaluate_model
from resmol.interop.load import load_model
from resmol.interop.model_ref import ModelRef
from resmol.run.checkpoint import weight_tensors
from resmol.run.checkpoint_manifest import AVERAGED, read_manifest
from resmol.run.directory import RunDir
from resmol.run.ledger import read_ledger, select
from resmol.train.averaging import update_weight
from resmol.train.build import make_loader, new_state
from resmol.train.parallel import Runtime
from resmol.train.step import train_step

ON = ("averaging.fraction=0.5", "averaging.every=2", "checkpoint.every=3", "evaluation.every=6")
RUNTIME = Runtime.single()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("averaged") / "run"


@pytest.fixture
def straight(finished: Path, train_tiny: TrainTiny) -> Path:
    """An uninterrupted run of 7 steps that averages; the last step is no update of the average."""
    if not finished.exists():
        train_tiny(finished, 7, *ON)
    return finished


def rising(number: int, eta: int) -> int:
    """Return number x (number + 1) x ... with ``eta`` factors."""
    return prod(range(number, number + eta))


@pytest.mark.parametrize(("fraction", "eta"), [(1.0, 0), (0.5, 2), (0.25, 6)])
@pytest.mark.parametrize("every", [1, 3])
def test_the_average_is_the_closed_form(
    fraction: float, eta: int, every: int, tiny_config: RunConfig, tiny_dataset: Dataset
) -> None:
    """With a whole eta, update i counts in proportion to the rising factorial of i (Shamir & Zhang 2013)."""
    config = tiny_config.replace({"averaging.fraction": fraction, "averaging.every": every})
    state, loader = new_state(config, RUNTIME), make_loader(config, tiny_dataset.train)
    assert state.average is not None
    kept: list[dict[str, torch.Tensor]] = []
    for step in range(1, 14):
        train_step(state, loader.step_after(state.windows_seen), config, RUNTIME)
        if step % every == 0:
            kept.append({name: t.double() for name, t in weight_tensors(state.model).items()})
    shares = [rising(number, eta) for number in range(1, len(kept) + 1)]
    for name, found in state.average.tensors.items():
        wanted = sum(share * weights[name] for share, weights in zip(shares, kept, strict=True)) / sum(shares)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 1.0])
def test_the_mean_age_is_that_of_a_plain_mean_over_the_fraction(fraction: float) -> None:
    age, updates = 0.0, 10_000
    for number in range(1, updates + 1):
        age = (1 - update_weight(number, fraction)) * (age + 1)
    assert age == pytest.approx(fraction * updates / 2, rel=0.001)


def test_training_does_not_notice(straight: Path, tmp_path: Path, train_tiny: TrainTiny) -> None:
    train_tiny(tmp_path / "run", 7, "checkpoint.every=3")
    with_average = bits(straight, 7)
    averages = with_average.pop(AVERAGED)
    plain, averaged = (
        {step: {**bits, "fingerprint": None} for step, bits in history(path).items()}  # it is of the average as well
        for path in (tmp_path / "run", straight)
    )
    assert plain == averaged
    assert with_average == bits(tmp_path / "run", 7)
    assert averages.keys() == with_average["model.safetensors"].keys()
    assert not set(averages.values()) & set(with_average["model.safetensors"].values())


def test_it_is_resumed_bit_for_bit(straight: Path, tmp_path: Path, train_tiny: TrainTiny) -> None:
    for steps in (3, 7):
        train_tiny(tmp_path / "run", steps, *ON)
    assert_equal_runs(tmp_path / "run", straight, 7)


def test_a_crash_between_saves_gives_the_same_average(straight: Path, tmp_path: Path, train_tiny: TrainTiny) -> None:
    with pytest.raises(Crash):
        train_tiny(tmp_path / "run", 7, *ON, log_writers=lambda _: [Hook(5, die)])
    train_tiny(tmp_path / "run", 7, *ON)
    records = read_ledger(tmp_path / "run" / "ledger.jsonl").records
    assert [(r["from_step"], r["to_step"]) for r in select(records, "rewind")] == [(5, 3)]
    assert_equal_runs(tmp_path / "run", straight, 7)


def test_the_audit_replays_it(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    checks = audit(RunDir(tmp_path / "run"), replay_options=ReplayOptions(count=9))
    assert all_passed(checks), checks
    replayed = next(check for check in checks if check.name == "replay of step 7")
    weights = len(read_manifest(straight / "checkpoints" / "step-00000007").files[AVERAGED].tensors)
    assert f"the {4 * weights} tensors" in replayed.measured


def test_replay_finds_an_average_that_was_not_updated(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    monkeypatch.setattr("resmol.train.averaging.WeightAverage.update", lambda *_: None)
    checks = audit(RunDir(tmp_path / "run"), replay_options=ReplayOptions(count=9))
    wrong = [check for check in checks if not check.passed]
    assert [check.name for check in wrong] == ["replay of steps 1 to 3", "replay of steps 4 to 6"]
    assert all(": fingerprint is " in check.measured for check in wrong), "found at the step, before the checkpoint"


# --- reading it --------------------------------------------------------------------------------------------------


def test_both_held_out_losses_are_those_of_the_two_sets(straight: Path) -> None:
    recorded = next(r for r in select(read_ledger(straight / "ledger.jsonl").records, "eval") if r["step"] == 7)
    for weights, field in (("last", "loss"), ("averaged", "averaged_loss")):
        found = evaluate_model(ModelRef(straight, weights), windows=8)
        assert found["loss"] == pytest.approx(recorded[field], abs=1e-5)
        assert found["model"]["weights"] == weights
    assert recorded["loss"] != recorded["averaged_loss"]


def test_averaged_weights_are_loaded(straight: Path) -> None:
    loaded = load_model(ModelRef(straight, "averaged"))
    stored = load_file(straight / "checkpoints" / "step-00000007" / AVERAGED)
    for name, tensor in weight_tensors(loaded.model).items():
        assert torch.equal(tensor, stored[name])
    assert "averaged weights" in loaded.source.describe()


def test_a_damaged_average_is_refused(straight: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-00000007"
    shutil.copytree(straight / "checkpoints" / path.name, path)
    content = bytearray((path / AVERAGED).read_bytes())
    content[-1] ^= 1
    (path / AVERAGED).write_bytes(content)
    with pytest.raises(CheckpointError, match=AVERAGED):
        load_model(path)


@pytest.mark.parametrize("change", ["fraction=0.2", "fraction=0", "every=4"])
def test_an_average_is_not_changed_in_the_middle(
    change: str, straight: Path, tmp_path: Path, train_tiny: TrainTiny
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"this run averages since its first step with 0\.5, every 2"):
        train_tiny(tmp_path / "run", 9, *ON, f"averaging.{change}")


def test_an_average_is_not_begun_in_the_middle(tmp_path: Path, train_tiny: TrainTiny) -> None:
    train_tiny(tmp_path / "run", 2)
    with pytest.raises(ConfigError, match="this run averages no weights") as caught:
        train_tiny(tmp_path / "run", 3, "averaging.fraction=0.2")
    assert "start a new run directory" in caught.value.fix
    with pytest.raises(DataError, match="keeps no averaged weights"):
        load_model(ModelRef(tmp_path / "run", "averaged"))


def test_there_is_no_choice_without_a_run(straight: Path, tmp_path: Path) -> None:
    checkpoint = straight / "checkpoints" / "step-00000007"
    assert load_model(ModelRef(checkpoint, "averaged")).source.averaged
    with pytest.raises(UsageError, match="is no run"):
        load_model(ModelRef(checkpoint, best=True))
    for name in ("model.safetensors", "config.json"):
        shutil.copy(checkpoint / name, tmp_path)
    with pytest.raises(UsageError, match="has one set of weights"):
        load_model(ModelRef(tmp_path, "averaged"))
    with pytest.raises(UsageError, match="has one set of weights"):
        load_model(ModelRef("owner/name", "averaged"))
