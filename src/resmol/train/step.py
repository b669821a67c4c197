"""An optimizer step: the gradient, the update, and what the ledger records of it.

The host asks the device for an update before it has seen loss and norm: the update itself looks whether they are
finite, on the device, and else changes nothing. So an accelerator can be given the gradient of the next step before the
host waits for the numbers of this one, and never waits for the host (`train_steps`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from resmol.config.run_config import RunConfig
from resmol.data.loader import Loader, StepBatch
from resmol.errors import NonFiniteError
from resmol.model.llama import CausalLM
from resmol.run.checkpoint import CheckpointTensors
from resmol.run.checkpoint_manifest import LossScale
from resmol.run.fingerprint import recorded_form
from resmol.run.mixture_place import MixturePlace
from resmol.train.averaging import WeightAverage
from resmol.train.devices import Reading, runs_ahead
from resmol.train.gradients import accumulate_gradients
from resmol.train.loss_scale import SMALLEST, after_step, factor_of_sum
from resmol.train.lr_schedule import lr_at
from resmol.train.optimizer import MuonWithAdamW, apply_update, gradient_norm
from resmol.train.parallel import Runtime
from resmol.train.state_fingerprint import StateFingerprint
from resmol.train.step_result import StepResult

WIDER = "runtime.precision=float32 --accept-drift runtime.precision"


@dataclass
class TrainState:
    """All that changes from step to step; what is not here cannot influence the next one."""

    model: CausalLM = field(repr=False)
    optimizer: torch.optim.Optimizer = field(repr=False)
    average: WeightAverage | None = field(default=None, repr=False)
    ddp: DistributedDataParallel | None = field(default=None, repr=False)  # the model, where ranks hold all of it
    fingerprint: StateFingerprint = field(default_factory=StateFingerprint, repr=False)
    step: int = 0
    tokens_seen: int = 0
    windows_seen: int = 0  # the place in the data; steps do not tell it, since the batch size may change
    mixture: MixturePlace | None = field(default=None, repr=False)  # and of which sources they were
    recent_losses: tuple[float, ...] = field(default=(), repr=False)  # the next loss is compared with; loss_spikes.py
    loss_scale: LossScale = field(default=LossScale(), repr=False)  # of the next step, in float16

    def tensors(self) -> CheckpointTensors:
        """Return the tensors of a checkpoint, themselves; there are moments from the first step on."""
        averaged = None if self.average is None else self.average.tensors
        return CheckpointTensors.of(self.model, self.optimizer, averaged)


@dataclass
class StartedStep:
    """A step whose gradient the device was asked for.

    Attributes:
        number: From 1.
        batch: Its data.
        divisor: What the update divides the gradient by: the tokens, times the factor of a scaled loss.
        norm: That of the mean gradient, where the device has it.
        is_finite: Whether loss and norm are, where the device has it.
        reading: The summed loss and the norm, on their way to the host.
        fingerprint: Of the state after the update, on its way to the host; None before it was asked for.
    """

    number: int
    batch: StepBatch
    divisor: float
    norm: Float[Tensor, ""]
    is_finite: Bool[Tensor, ""]
    reading: Reading
    fingerprint: Reading | None = None

    def loss_and_norm(self) -> tuple[float, float]:
        """Wait for the mean loss and the norm of the mean gradient."""
        total, norm = self.reading.read()
        return total / self.batch.tokens, norm


def train_steps(state: TrainState, loader: Loader, config: RunConfig, runtime: Runtime) -> Iterator[StepResult]:
    """Train to ``config.train.steps``; with each result, the state is the one after its step.

    Where the device runs ahead, it is asked for the gradient of the next step before this one's numbers are read. That
    changes no weights, and nothing updates them before the caller asks for the next result: whatever the caller does
    with the state in between, it finds what it would find otherwise.

    Raises:
        NonFiniteError: As `train_step`.
        DataError: A shard is damaged.
    """
    if _can_run_ahead(state, runtime):
        yield from _steps_ahead(state, loader, config, runtime)
    while state.step < config.train.steps:
        runtime.set_phase(f"step {state.step + 1}")
        batch = loader.step_after(state.windows_seen, runtime.rank, runtime.world_size)
        yield train_step(state, batch, config, runtime)


def _steps_ahead(state: TrainState, loader: Loader, config: RunConfig, runtime: Runtime) -> Iterator[StepResult]:
    ahead: StartedStep | None = None
    while state.step < config.train.steps:
        runtime.set_phase(f"step {state.step + 1}")
        step = ahead or _start_after(state, state.step, state.windows_seen, loader, config, runtime)
        update_weights(state, step, config)
        step.fingerprint = _fingerprint(state, step.number, config, runtime)
        is_last = step.number == config.train.steps
        ahead = None if is_last else _start_after(state, step.number, step.batch.windows_seen, loader, config, runtime)
        result = finish_step(state, step, config, runtime)
        if result is None:
            ahead, result = None, _second_attempt(state, step.batch, config, runtime)
        yield result


def train_step(state: TrainState, batch: StepBatch, config: RunConfig, runtime: Runtime) -> StepResult:
    """Do one optimizer step, wait for it, and count it.

    Args:
        state: Model, optimizer and counters; changed in place, or not at all if this raises.
        batch: The data of the step that follows ``state.windows_seen`` windows.
        config: Learning rate, clipping, chunking.
        runtime: Device, arithmetic and the other ranks.

    Raises:
        NonFiniteError: The loss or the gradient is not finite, twice.
        DataError: A shard is damaged.
    """
    step = start_step(state, state.step + 1, batch, config, runtime)
    update_weights(state, step, config)
    return finish_step(state, step, config, runtime) or _second_attempt(state, batch, config, runtime)


def start_step(state: TrainState, number: int, batch: StepBatch, config: RunConfig, runtime: Runtime) -> StartedStep:
    """Ask the device for the gradient of a step, and for the loss and the norm; wait for nothing."""
    factor = factor_of_sum(state.loss_scale, config) if runtime.scales_loss else None
    divisor = batch.tokens * (1.0 if factor is None else factor)
    model, length = state.ddp or state.model, config.data.seq_len_at(number)
    total = accumulate_gradients(model, batch.batches, config, runtime, factor, length)
    norm = gradient_norm(state.model, divisor)
    numbers = torch.stack([total, norm])
    return StartedStep(number, batch, divisor, norm, numbers.isfinite().all(), Reading(numbers))


def update_weights(state: TrainState, step: StartedStep, config: RunConfig) -> None:
    """Ask the device to update the weights, unless loss or norm are not finite; wait for nothing."""
    apply_update(
        state.optimizer,
        lr=lr_at(step.number, config.schedule, config.optimizer.lr),
        divisor=step.divisor,
        norm=step.norm,
        clip_norm=config.optimizer.clip_norm,
        is_finite=step.is_finite,
    )


def finish_step(state: TrainState, step: StartedStep, config: RunConfig, runtime: Runtime) -> StepResult | None:
    """Wait for a step that has updated the weights, and count it; None, and nothing is counted, where it did not.

    A gradient that overflowed at a loss scale that can still be lowered is a step without an update. The loss does not
    depend on the scale, so one that is not finite is never an overflow of that kind.
    """
    loss, norm = step.loss_and_norm()
    scale = state.loss_scale.scale
    skipped = runtime.scales_loss and math.isfinite(loss) and not math.isfinite(norm) and scale > SMALLEST
    if not skipped and not (math.isfinite(loss) and math.isfinite(norm)):
        return None
    batch, state.step = step.batch, step.number
    if state.average is not None and not skipped:
        state.average.update(state.step)
    if runtime.scales_loss:
        state.loss_scale = after_step(state.loss_scale, skipped=skipped)
    state.tokens_seen += batch.tokens
    state.windows_seen, state.mixture = batch.windows_seen, batch.mixture
    fingerprint = step.fingerprint or _fingerprint(state, state.step, config, runtime)
    return StepResult(
        step=state.step,
        loss=loss,
        grad_norm=None if skipped else norm,
        lr=lr_at(state.step, config.schedule, config.optimizer.lr),
        tokens=batch.tokens,
        tokens_seen=state.tokens_seen,
        windows_seen=state.windows_seen,
        windows=batch.window_digest,
        epoch=batch.epoch,
        fingerprint=recorded_form(fingerprint.read(), config.fingerprint_steps),
        loss_scale=scale if runtime.scales_loss else None,
        sources_seen=() if batch.mixture is None else batch.mixture.seen,
        sources_tokens=batch.source_tokens,
    )


def _second_attempt(state: TrainState, batch: StepBatch, config: RunConfig, runtime: Runtime) -> StepResult:
    """Compute a step again: a flipped bit does not happen twice; bad data or a diverged model does."""
    state.optimizer.zero_grad(set_to_none=True)  # of the step after it, where the device ran ahead
    step = start_step(state, state.step + 1, batch, config, runtime)
    update_weights(state, step, config)
    result = finish_step(state, step, config, runtime)
    if result is None:
        loss, norm = step.loss_and_norm()
        windows = [window for micro_batch in batch.batches for window in micro_batch.window_ids]
        other = f"; or train on with --set {WIDER}" if config.runtime.precision == "float16" else ""
        raise NonFiniteError(
            f"step {step.number} has loss {loss} and gradient norm {norm}, twice (windows {windows[:16]})",
            fix="the weights are those of the step before; look at these windows, or start with a lower optimizer.lr"
            + other,
        )
    return result


def _start_after(
    state: TrainState, done: int, windows_seen: int, loader: Loader, config: RunConfig, runtime: Runtime
) -> StartedStep:
    batch = loader.step_after(windows_seen, runtime.rank, runtime.world_size)
    return start_step(state, done + 1, batch, config, runtime)


def _can_run_ahead(state: TrainState, runtime: Runtime) -> bool:
    """Return whether the next gradient can be asked for before this step's numbers are known.

    The loss scale of float16 follows from them, and an average must not take in weights that were not updated. Muon's
    update asks for them itself.
    """
    is_guarded = not isinstance(state.optimizer, MuonWithAdamW)
    return runs_ahead(runtime.device) and is_guarded and state.average is None and not runtime.scales_loss


def _fingerprint(state: TrainState, step: int, config: RunConfig, runtime: Runtime) -> Reading:
    return Reading(state.fingerprint.of_step(step, state.tensors, config, runtime))
