"""A step that waits for nothing, and a device that runs ahead: the same run, bit for bit, whatever happens in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_equal_runs
from tiny import TrainTiny
from torch.utils._python_dispatch import TorchDispatchMode

from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.data.shards import Dataset
from resmol.errors import NonFiniteError
from resmol.model import cross_entropy
from resmol.model.llama import CausalLM
from resmol.run.checkpoint import digest_all, weight_tensors
from resmol.train import step as module
from resmol.train.build import make_loader, new_state
from resmol.train.gradients import accumulate_gradients
from resmol.train.optimizer import gradient_norm
from resmol.train.parallel import Runtime, open_runtime
from resmol.train.step import TrainState, start_step, train_steps, update_weights

OFTEN = ("evaluation.every=2", "sampling.every=3", "sampling.max_new_tokens=2", "checkpoint.every=4")


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Let this process run ahead, as an accelerator does; return what it asks for, in order."""
    asked: list[tuple[str, int]] = []
    start, update, finish = module.start_step, module.update_weights, module.finish_step

    def starting(state: TrainState, number: int, *rest: Any) -> Any:
        asked.append(("start", number))
        return start(state, number, *rest)

    def updating(state: TrainState, step: Any, *rest: Any) -> None:
        asked.append(("update", step.number))
        update(state, step, *rest)

    def finishing(state: TrainState, step: Any, *rest: Any) -> Any:
        asked.append(("finish", step.number))
        return finish(state, step, *rest)

    monkeypatch.setattr(module, "runs_ahead", lambda _device: True)
    monkeypatch.setattr(module, "start_step", starting)
    monkeypatch.setattr(module, "update_weights", updating)
    monkeypatch.setattr(module, "finish_step", finishing)
    return asked


@pytest.fixture(scope="module")
def waited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("waited") / "run"


@pytest.fixture
def straight(waited: Path, train_tiny: TrainTiny) -> Path:
    """A run of 8 steps whose every step was waited for."""
    if not waited.exists():
        train_tiny(waited, 8, *OFTEN)
    return waited


def test_running_ahead_changes_no_bit(
    straight: Path, ahead: list[tuple[str, int]], tmp_path: Path, train_tiny: TrainTiny
) -> None:
    """Evaluations, samples, checkpoints, the end of one invocation and the start of the next all fall in between."""
    train_tiny(tmp_path / "run", 5, *OFTEN)
    train_tiny(tmp_path / "run", 8, *OFTEN)
    assert_equal_runs(tmp_path / "run", straight, 8)
    assert ahead[:6] == [
        ("start", 1), ("update", 1), ("start", 2), ("finish", 1), ("update", 2), ("start", 3)
    ]  # fmt: skip
    assert ahead[-2:] == [("update", 8), ("finish", 8)]


@pytest.mark.parametrize("override", ["averaging.fraction=0.5", "runtime.precision=float16", "optimizer.name=muon"])
def test_what_needs_the_numbers_of_a_step_waits_for_it(
    override: str, ahead: list[tuple[str, int]], tmp_path: Path, train_tiny: TrainTiny
) -> None:
    train_tiny(tmp_path / "run", 2, override)
    assert ahead == [(what, step) for step in (1, 2) for what in ("start", "update", "finish")]


def spoil(patch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """Give the gradient of these calls, counted from 1, a number that is none."""
    genuine, made = module.accumulate_gradients, [0]

    def spoiled(model: Any, *rest: Any) -> torch.Tensor:
        total = genuine(model, *rest)
        made[0] += 1
        if made[0] in calls:
            next(model.parameters()).grad[0] = torch.nan
        return total

    patch.setattr(module, "accumulate_gradients", spoiled)


@pytest.mark.usefixtures("ahead")
def test_a_bad_gradient_is_computed_again_and_the_one_begun_after_it_too(
    straight: Path, tmp_path: Path, train_tiny: TrainTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {3})
    train_tiny(tmp_path / "run", 8, *OFTEN)
    assert_equal_runs(tmp_path / "run", straight, 8)


@pytest.mark.usefixtures("ahead")
def test_a_gradient_that_is_bad_twice_updates_nothing(
    tiny_config: RunConfig, tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {3, 5})  # step 3, and again after that of step 4 was begun
    config = with_overrides(tiny_config, ["train.steps=8"])
    with open_runtime(config) as runtime:
        state = new_state(config, runtime)
        steps = train_steps(state, make_loader(config, tiny_dataset.train), config, runtime)
        for _ in range(2):
            next(steps)
        before, seen = digest_all(state.tensors().files["model.safetensors"]), state.windows_seen
        with pytest.raises(NonFiniteError, match=r"step 3 .* twice"):
            next(steps)
    assert (state.step, state.windows_seen) == (2, seen)
    assert digest_all(weight_tensors(state.model)) == before
    moments = next(iter(state.optimizer.state.values()))
    assert float(moments["step"]) == 2
    assert moments["exp_avg"].isfinite().all()


class NoLook(TorchDispatchMode):
    """Fails where the host would wait for a device: at a look at a number, or at a size that depends on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert func not in LOOKS, func
        assert not by_mask, func
        return func(*args, **(kwargs or {}))


LOOKS = {
    torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default, torch.ops.aten.equal.default,
}  # fmt: skip
INDEXED = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}


@pytest.fixture
def tiny_batch(tiny_config: RunConfig, tiny_dataset: Dataset) -> Any:
    return make_loader(tiny_config, tiny_dataset.train).step_after(0)


def test_a_gradient_is_asked_for_without_a_look_at_a_number(
    tiny_config: RunConfig, tiny_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that has no numbers to look at, `meta`; nor has it an autocast."""
    monkeypatch.setattr(cross_entropy, "_compute_dtype", lambda hidden: hidden.dtype)
    with torch.device("meta"):
        model = CausalLM(tiny_config.model)
    with NoLook():
        total = accumulate_gradients(model, tiny_batch.batches, tiny_config, Runtime.single("meta"))
        norm = gradient_norm(model, 1.0)
    assert (total.device.type, norm.device.type) == ("meta", "meta")


def test_an_update_is_asked_for_without_a_look_at_a_number(tiny_config: RunConfig, tiny_batch: Any) -> None:
    """The fused kernel and the guard are those of every device."""
    with open_runtime(tiny_config) as runtime:
        state = new_state(tiny_config, runtime)
        before = digest_all(weight_tensors(state.model))
        step = start_step(state, 1, tiny_batch, tiny_config, runtime)
        with NoLook():
            update_weights(state, step, tiny_config)
            state.fingerprint.of_step(1, state.tensors, tiny_config, runtime)
    assert digest_all(weight_tensors(state.model)) != before


def test_a_look_is_noticed() -> None:
    for look in _looks():
        with pytest.raises(AssertionError), NoLook():
            look(torch.ones(3))


def _looks() -> Iterator[Any]:
    yield from (
        lambda x: float(x[0]),
        lambda x: bool(x.all()),
        lambda x: x[0].item(),
        lambda x: x[x > 0],
        _zero_by_mask,
    )


def _zero_by_mask(x: torch.Tensor) -> None:
    x[x > 0] = 0.0
