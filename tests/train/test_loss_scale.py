"""The loss scale of float16: PyTorch's rule, steps that are skipped and recorded, and a resume that changes no bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import bits, history
from tiny import TrainTiny

from resmol.audit.audit import audit
from resmol.audit.replay import ReplayOptions
from resmol.checks import all_passed
from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.errors import NonFiniteError
from resmol.run.checkpoint import digest_all, weight_tensors
from resmol.run.checkpoint_manifest import AVERAGED, OPTIMIZER, WEIGHTS, LossScale, SavedState
from resmol.run.directory import RunDir
from resmol.run.ledger import effective_steps, read_ledger
from resmol.train import loss_scale
from resmol.train import step as module
from resmol.train.build import make_loader, new_state
from resmol.train.loss_scale import SMALLEST, after_step, factor_of_sum
from resmol.train.parallel import open_runtime

FLOAT16 = ("runtime.precision=float16", "averaging.fraction=0.5", "averaging.every=1", "optimizer.name=muon")


def scales(run: Path) -> list[tuple[float, bool]]:
    steps = effective_steps(read_ledger(run / "ledger.jsonl").records)
    return [(steps[step]["loss_scale"], steps[step]["skipped"]) for step in sorted(steps)]


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scale grow every few steps, so that gradients overflow again and again."""
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)


def test_the_rule_is_that_of_pytorchs_scaler(restless: None) -> None:
    scaler = torch.amp.GradScaler("cpu", growth_interval=loss_scale.GROWTH_INTERVAL)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, ours = torch.optim.SGD([weight], lr=0.0), LossScale()
    scaler.scale(torch.ones(1))  # makes its state
    for overflows in (False, False, True, False, False, False, False, False, False, True, True, False):
        weight.grad = torch.full((1,), float("inf") if overflows else 1.0)
        scaler.step(optimizer)
        scaler.update()
        ours = after_step(ours, skipped=overflows)
        assert (ours.scale, ours.good_steps) == (scaler.get_scale(), scaler.state_dict()["_growth_tracker"])
    assert ours.skipped_steps == 3


def test_the_scale_is_that_of_a_mean(tiny_config: RunConfig) -> None:
    assert factor_of_sum(LossScale(), tiny_config) * 2 * 16 == 2.0**16, "2 windows of 16 tokens"


@pytest.fixture
def straight(shared: Path, train_tiny: TrainTiny, restless: None) -> Path:
    """An uninterrupted run of 20 steps."""
    if not shared.exists():
        train_tiny(shared, 20, *FLOAT16)
    return shared


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("float16") / "straight"


def differences(one: Path, other: Path) -> set[str]:
    """Return in what two runs of 20 steps differ."""
    pairs = {
        "scales": (scales(one), scales(other)),
        "history": (history(one), history(other)),
        "tensors": (bits(one, 20), bits(other, 20)),
    }
    return {name for name, (left, right) in pairs.items() if left != right}


def test_twelve_then_twenty_is_twenty(straight: Path, tmp_path: Path, train_tiny: TrainTiny) -> None:
    """Steps are skipped before and after the resume; the audit and the replay of the resumed run find nothing wrong."""
    run = tmp_path / "run"
    train_tiny(run, 12, *FLOAT16)
    assert scales(run) == scales(straight)[:12]
    train_tiny(run, 20, *FLOAT16)
    assert differences(run, straight) == set()
    assert [any(skipped for _, skipped in part) for part in (scales(run)[:12], scales(run)[12:])] == [True, True]
    checks = audit(RunDir(run), strict=True, replay_options=ReplayOptions(2))
    assert all_passed(checks), [check for check in checks if not check.passed]
    assert "skipped: overflow at loss scale" in (run / "train.log").read_text()


@pytest.mark.parametrize(
    ("lost", "found"),
    [
        ("scale", {"scales", "history", "tensors"}),
        ("good_steps", {"scales", "history", "tensors"}),
        ("skipped_steps", {"history", "tensors"}),  # which the optimizer's correction of a bias depends on
    ],
)
def test_what_a_checkpoint_loses_shows(
    lost: str, found: set[str], straight: Path, tmp_path: Path, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, fresh = SavedState.to_bytes, LossScale()

    def forgetful(state: SavedState) -> bytes:
        scale = state.loss_scale.model_copy(update={lost: getattr(fresh, lost)})
        return genuine(state.model_copy(update={"loss_scale": scale}))

    monkeypatch.setattr(SavedState, "to_bytes", forgetful)
    train_tiny(tmp_path / "run", 12 if lost == "skipped_steps" else 17, *FLOAT16)
    train_tiny(tmp_path / "run", 20, *FLOAT16)
    assert differences(tmp_path / "run", straight) == found
    failed = {check.name for check in audit(RunDir(tmp_path / "run")) if not check.passed}
    assert failed == ({"loss scale"} if "scales" in found else set())


def test_a_step_that_overflows_updates_nothing(tiny_config: RunConfig, tiny_dataset: Dataset) -> None:
    """The first of a run, even; the step after it is, bit for bit, the first update of an optimizer."""
    config = with_overrides(tiny_config, FLOAT16[:3])
    loader = make_loader(config, tiny_dataset.train)
    with open_runtime(config) as runtime:
        state, fresh = new_state(config, runtime), new_state(config, runtime)
        state.loss_scale = LossScale(scale=2.0**60)
        result = module.train_step(state, loader.step_after(0), config, runtime)
        assert (result.skipped, result.loss_scale, state.step, state.windows_seen) == (True, 2.0**60, 1, 4)
        assert state.loss_scale == LossScale(scale=2.0**59, skipped_steps=1)
        files = state.tensors().files
        assert digest_all(files[WEIGHTS]) == digest_all(files[AVERAGED]) == digest_all(weight_tensors(fresh.model))
        assert not any(moment.any() for moment in files[OPTIMIZER].values())
        state.loss_scale = LossScale(scale=2.0**10)
        fresh.step, fresh.windows_seen, fresh.loss_scale = 1, 4, state.loss_scale
        for one in (state, fresh):
            module.train_step(one, loader.step_after(4), config, runtime)
        assert digest_all(weight_tensors(state.model)) == digest_all(weight_tensors(fresh.model))


@pytest.mark.parametrize(
    ("scale", "loss", "stops"),
    [(2.0**16, 1.0, False), (SMALLEST, 1.0, True), (2.0**16, math.nan, True), (2.0**16, math.inf, True)],
    ids=["an overflow", "at the smallest scale", "a loss that is no number", "an infinite loss"],
)
def test_a_diverged_model_is_no_overflow(
    tiny_config: RunConfig, tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch,
    scale: float, loss: float, stops: bool,
) -> None:  # fmt: skip
    genuine = module.accumulate_gradients

    def spoiled(model: Any, *rest: Any) -> torch.Tensor:
        total = genuine(model, *rest)
        next(model.parameters()).grad.fill_(math.inf)
        return total * loss

    monkeypatch.setattr(module, "accumulate_gradients", spoiled)
    config = with_overrides(tiny_config, FLOAT16[:1])
    with open_runtime(config) as runtime:
        state = new_state(config, runtime)
        state.loss_scale = LossScale(scale=scale)
        batch = make_loader(config, tiny_dataset.train).step_after(0)
        if not stops:
            assert module.train_step(state, batch, config, runtime).skipped
            return
        with pytest.raises(NonFiniteError, match=r"twice") as error:
            module.train_step(state, batch, config, runtime)
    assert "--set runtime.precision=float32 --accept-drift runtime.precision" in error.value.fix
    assert state.step == 0
