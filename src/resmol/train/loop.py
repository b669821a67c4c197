"""The training loop, the file to read first: what a step is, and what happens around it.

There are no callbacks and nothing to inherit from. A step is a pure function of the state and the data: the batch
depends on the windows seen so far, the learning rate on the step's number, so a resumed run does what an uninterrupted
one does.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from resmol.config.run_config import RunConfig
from resmol.data.loader import Batches, Loader, StepBatch
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed, Interrupted, NonFiniteError
from resmol.inference.generate import generate
from resmol.inference.sampling_params import SamplingParams
from resmol.model.llama import CausalLM
from resmol.run.async_save import AsyncCheckpointer
from resmol.run.checkpoint import CheckpointTensors
from resmol.run.checkpoint_manifest import LossScale, SavedState
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, is_finished
from resmol.run.log_writers import RunLog
from resmol.run.mixture_place import MixturePlace
from resmol.system.signals import StopSignal
from resmol.train.averaging import WeightAverage
from resmol.train.evaluate import Evaluation, evaluate
from resmol.train.gradients import accumulate_gradients
from resmol.train.loss_scale import SMALLEST, after_step, factor_of_sum
from resmol.train.loss_spikes import append_loss, is_spike
from resmol.train.lr_schedule import lr_at
from resmol.train.optimizer import apply_update, gradient_norm, skip_update
from resmol.train.overfitting import record_repetition, record_turn
from resmol.train.parallel import Runtime
from resmol.train.state_fingerprint import StateFingerprint, whole_fingerprint
from resmol.train.step_result import StepResult, first_difference

WIDER = "runtime.precision=float32 --accept-drift runtime.precision"
STRAGGLER_STEPS = 10  # the work of the ranks is compared every so many steps


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


@dataclass(frozen=True)
class Session:
    """What one invocation of training works with; only the configuration and the data influence the numbers."""

    run: RunDir
    config: RunConfig
    runtime: Runtime
    loader: Loader
    val: Loader | None
    data_fingerprint: str
    tokenizer: Tokenizer
    run_log: RunLog
    checkpointer: AsyncCheckpointer
    stop: StopSignal
    recorded: dict[int, Record] = field(default_factory=dict)  # steps that a crash took back, to be compared with


def train(state: TrainState, session: Session) -> None:
    """Train from ``state.step`` to ``config.train.steps``; evaluate, sample and save on the way.

    Raises:
        Interrupted: A signal arrived; the step was finished and saved.
        NonFiniteError: A loss or gradient is not finite twice in a row; the weights were not updated with it. A
            gradient that a smaller loss scale may make finite is none of these: the step is skipped.
        CheckFailed: A step that is executed again after a crash gives other bits than the ledger recorded, or the
            loss jumped and ``train.on_spike`` is stop.
        DataError: A shard is damaged.
        DiskFull: A checkpoint could not be written, even after older ones were pruned.
        ProcessLost: Another rank died, froze, or did not reach a collective within ``runtime.collective_timeout``
            seconds.
    """
    config, runtime = session.config, session.runtime
    while state.step < config.train.steps:
        started = time.perf_counter()
        step = state.step + 1
        runtime.set_phase(f"step {step}")
        batch = session.loader.step_after(state.windows_seen, runtime.rank, runtime.world_size)
        result = train_step(state, batch, config, runtime)
        seconds = time.perf_counter() - started

        record_step(session, result, seconds)
        spike = record_spike(state, session, result.loss)
        record_straggler(session, step, seconds)
        record_repetition(session.run_log, session.loader, step, result.windows_seen)
        session.checkpointer.poll()
        stopping, retrying = runtime.any_rank(session.stop.requested, session.checkpointer.retry_pending)
        if not stopping and is_due(config.evaluation.every, step, config.train.steps):
            record_evaluation(state, session)
        if not stopping and is_due(config.sampling.every, step, config.train.steps):
            record_sample(state, session)
        if stopping or retrying or session.checkpointer.should_save(step):
            save(state, session, wait=stopping or step == config.train.steps)
        if spike and config.train.on_spike == "stop":
            raise CheckFailed(
                f"the loss of step {step} is {result.loss:.4f}, far above the recent ones; train.on_spike is stop",
                fix="look at its windows and at the learning rate; to go on all the same: --set train.on_spike=warn",
            )
        if stopping:
            session.run_log.write("stop", step=step, reason=session.stop.name or "a signal to another rank")
            raise Interrupted(
                f"stopped by {session.stop.name or 'a signal to another rank'} after step {step}, which is saved",
                fix="run the same command again to go on",
                signal_number=session.stop.number or 15,
            )
    if not is_finished(session.run_log.records, state.step):
        session.run_log.write("stop", step=state.step, reason="finished")


def train_step(state: TrainState, batch: StepBatch, config: RunConfig, runtime: Runtime) -> StepResult:
    """Do one optimizer step and count it.

    Args:
        state: Model, optimizer and counters; changed in place, or not at all if this raises.
        batch: The data of the step that follows ``state.windows_seen`` windows.
        config: Learning rate, clipping, chunking.
        runtime: Device, arithmetic and the other ranks.

    Raises:
        NonFiniteError: The loss or the gradient is not finite, twice.
        DataError: A shard is damaged.
    """
    factor = factor_of_sum(state.loss_scale, config) if runtime.scales_loss else None
    divisor = batch.tokens * (1.0 if factor is None else factor)
    loss, norm = _loss_and_gradient(state, batch, config, runtime, factor, divisor)
    lr = lr_at(state.step + 1, config.schedule, config.optimizer.lr)
    state.step += 1
    if norm is None:
        skip_update(state.optimizer)
    else:
        apply_update(state.optimizer, lr=lr, divisor=divisor, norm=norm, clip_norm=config.optimizer.clip_norm)
        if state.average is not None:
            state.average.update(state.step)
    scale = state.loss_scale.scale
    if runtime.scales_loss:
        state.loss_scale = after_step(state.loss_scale, skipped=norm is None)
    state.tokens_seen += batch.tokens
    state.windows_seen, state.mixture = batch.windows_seen, batch.mixture
    return StepResult(
        step=state.step,
        loss=loss,
        grad_norm=None if norm is None else float(norm),
        lr=lr,
        tokens=batch.tokens,
        tokens_seen=state.tokens_seen,
        windows_seen=state.windows_seen,
        windows=batch.window_digest,
        epoch=batch.epoch,
        fingerprint=state.fingerprint.of_step(state.step, state.tensors, config, runtime),
        loss_scale=scale if runtime.scales_loss else None,
        sources_seen=() if batch.mixture is None else batch.mixture.seen,
        sources_tokens=batch.source_tokens,
    )


def _loss_and_gradient(
    state: TrainState, batch: StepBatch, config: RunConfig, runtime: Runtime, factor: float | None, divisor: float
) -> tuple[float, Tensor | None]:
    """Compute the gradient of the step; return the mean loss and the norm of the mean gradient.

    The norm is None where the gradient overflowed at a loss scale that can still be lowered. The loss does not depend
    on the scale, so one that is not finite is never an overflow of that kind.
    """
    for _attempt in range(2):  # a flipped bit does not happen twice; bad data or a diverged model does
        total = accumulate_gradients(state.ddp or state.model, batch.batches, config, runtime, factor)
        norm = gradient_norm(state.model, divisor)
        loss, grad_norm = float(total) / batch.tokens, float(norm)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return loss, norm
        if math.isfinite(loss) and factor is not None and state.loss_scale.scale > SMALLEST:
            return loss, None
        state.optimizer.zero_grad(set_to_none=True)
    windows = [window for micro_batch in batch.batches for window in micro_batch.window_ids]
    other = f"; or train on with --set {WIDER}" if config.runtime.precision == "float16" else ""
    raise NonFiniteError(
        f"step {state.step + 1} has loss {loss} and gradient norm {grad_norm}, twice (windows {windows[:16]})",
        fix="the weights are those of the step before; look at these windows, or start with a lower optimizer.lr"
        + other,
    )


def is_due(every: int, step: int, last: int) -> bool:
    """Return whether something that happens every so many steps (0: never) and at the last one happens now."""
    return every > 0 and (step % every == 0 or step == last)


def record_step(session: Session, result: StepResult, seconds: float) -> None:
    """Write the step into the ledger; if it was executed before, it must be the same step again."""
    record = session.run_log.write("step", **result.to_record(), seconds=round(seconds, 6))
    before = session.recorded.pop(result.step, record)
    if name := first_difference(before, record):
        session.run_log.write("warn", what="re-executed step differs", step=result.step, field=name)
        session.run_log.sync()
        raise CheckFailed(
            f"step {result.step} was executed again after a crash and its {name} is {record.get(name)}; the ledger "
            f"has {before.get(name)} from the first time",
            fix="check the machine's memory and whether code, libraries or data changed since",
        )


def record_spike(state: TrainState, session: Session, loss: float) -> bool:
    """Keep the loss, and record it if it lies far above those before; the decision is the same on every rank."""
    spike = is_spike(loss, state.recent_losses)
    if spike:
        median = statistics.median(state.recent_losses)
        session.run_log.write("warn", what="loss spike", step=state.step, loss=loss, median=median)
    state.recent_losses = append_loss(loss, state.recent_losses)
    return spike


def record_straggler(session: Session, step: int, seconds: float) -> None:
    """Record the rank that the others wait for, if there is one; the ranks are compared every few steps."""
    monitor = session.runtime.monitor
    if monitor is None:
        return
    monitor.count_work(seconds)
    if step % STRAGGLER_STEPS == 0 and (reason := monitor.straggler(session.runtime.device)):
        session.run_log.write("warn", what="straggler", step=step, reason=reason)


def record_evaluation(state: TrainState, session: Session) -> None:
    """Measure the held-out loss, also that of the averaged weights where there are some.

    No compiled code takes part, so that it does not depend on how training computes.
    """
    if session.val is None:
        return
    session.runtime.set_phase(f"evaluation after step {state.step}")
    started = time.perf_counter()
    config = session.config
    windows, tokenizer = config.evaluation.windows or None, session.tokenizer
    batches = session.val.sequential(config.batch.micro_batch_size, windows)
    spelled = tokenizer.spelled_end_bytes(session.val.spelled_ends(windows))
    lengths = tokenizer.byte_lengths()
    measure = partial(evaluate, state.model, batches, lengths, session.runtime, spelled_bytes=spelled)
    with torch.compiler.set_stance("force_eager"):
        result = measure()
        averaged = {}
        if state.average is not None:
            with state.average.in_model():
                second = measure()
            averaged = {"averaged_loss": second.loss, "averaged_bits_per_byte": second.bits_per_byte}
    session.run_log.write(
        "eval",
        step=state.step,
        split="val",
        loss=result.loss,
        bits_per_byte=result.bits_per_byte,
        **averaged,
        **losses_by_source(result, session.val, batches),
        tokens=result.tokens,
        bytes=result.bytes,
        seconds=round(time.perf_counter() - started, 3),
    )
    record_turn(session.run_log, state.step)


def losses_by_source(result: Evaluation, val: Loader, batches: Batches) -> Record:
    """Return the field with the held-out loss of each source of a mixture; nothing for other data."""
    return {"source_losses": result.by_source(val.streams_of(batches), val.names)} if val.names else {}


def record_sample(state: TrainState, session: Session) -> None:
    """Sample from the model, on rank 0 alone; the other ranks go on and wait for it in the next step's all-reduce.

    The sample has a random generator of its own, so that training's is not touched. Ranks that share the model gather
    its weights together: all of them then generate the same text, and rank 0 records it.
    """
    if not session.runtime.is_rank_zero and session.runtime.mesh is None:
        return
    session.runtime.set_phase(f"sample after step {state.step}")
    wanted = session.config.sampling
    sampling = SamplingParams(wanted.max_new_tokens, wanted.temperature, wanted.top_k, wanted.top_p, wanted.seed)
    prompt = session.tokenizer.encode(wanted.prompt)[-(state.model.config.max_position_embeddings - 1) :]
    with torch.compiler.set_stance("force_eager"), session.runtime.gathered(state.model):
        new = list(generate(state.model, prompt, sampling, eos_id=session.tokenizer.eos_id))
    text = session.tokenizer.decode(new)
    session.run_log.write("sample", step=state.step, prompt=wanted.prompt, text=text, seed=wanted.seed)


def save(state: TrainState, session: Session, *, wait: bool = False) -> None:
    """Write a checkpoint of this step; it becomes durable in the background, or before this returns with ``wait``.

    All ranks write it together.
    """
    session.runtime.set_phase(f"checkpoint of step {state.step}")
    tensors = state.tensors()
    saved = SavedState(
        step=state.step,
        tokens_seen=state.tokens_seen,
        windows_seen=state.windows_seen,
        config_sha256=session.config.sha256,
        data_fingerprint=session.data_fingerprint,
        ledger_head=session.run_log.head,
        random_state=torch.get_rng_state().numpy().tobytes().hex(),
        permanent=state.step in session.config.checkpoint.permanent,
        recent_losses=state.recent_losses,
        loss_scale=state.loss_scale,
        mixture=state.mixture,
        fingerprint=whole_fingerprint(tensors, session.runtime),
    )
    session.checkpointer.save(saved, tensors, wait=wait)
