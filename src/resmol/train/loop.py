"""The training loop, the file to read first: what a step is, and what happens around it.

There are no callbacks and nothing to inherit from. A step is a pure function of the state and the data: the batch
depends on the windows seen so far, the learning rate on the step's number, so a resumed run does what an uninterrupted
one does.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from functools import partial

import torch

from resmol.config.run_config import RunConfig
from resmol.data.loader import Batches, Loader
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed, Interrupted
from resmol.inference.generate import generate
from resmol.inference.sampling_params import SamplingParams
from resmol.run.async_save import AsyncCheckpointer
from resmol.run.checkpoint_manifest import SavedState
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, is_finished
from resmol.run.log_writers import RunLog
from resmol.system.signals import StopSignal
from resmol.train.evaluate import Evaluation, evaluate, windows_at_once
from resmol.train.loss_spikes import append_loss, is_spike
from resmol.train.overfitting import record_repetition, record_turn
from resmol.train.parallel import Runtime
from resmol.train.state_fingerprint import whole_fingerprint
from resmol.train.step import TrainState, train_steps
from resmol.train.step_result import StepResult, first_difference

STRAGGLER_STEPS = 10  # the work of the ranks is compared every so many steps


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
    started = time.perf_counter()
    for result in train_steps(state, session.loader, config, runtime):
        step, seconds = result.step, time.perf_counter() - started
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
        started = time.perf_counter()
    if not is_finished(session.run_log.records, state.step):
        session.run_log.write("stop", step=state.step, reason="finished")


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
    if step % STRAGGLER_STEPS == 0 and (reason := monitor.straggler()):
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
    batches = session.val.sequential(windows_at_once(config.data.seq_len), windows)
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
