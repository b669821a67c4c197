"""The training loop, the file to read first: what a step is, and what happens around it.

There are no callbacks and nothing to inherit from. A step is a pure function of the state, the step number and the
data: batches and learning rate depend on the number alone, so a resumed run does what an uninterrupted one does.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resmol.config.run_config import RunConfig
from resmol.data.loader import Batch, Loader
from resmol.data.tokenizer import Tokenizer
from resmol.errors import CheckFailed, Interrupted, NonFiniteError
from resmol.inference.generate import SamplingParams, generate
from resmol.model.cross_entropy import cross_entropy_sum
from resmol.model.llama import CausalLM
from resmol.run.async_save import AsyncCheckpointer
from resmol.run.checkpoint import CheckpointTensors
from resmol.run.checkpoint_manifest import SavedState
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, float_bits
from resmol.run.log_writers import RunLog
from resmol.system.signals import StopSignal
from resmol.train.evaluate import evaluate
from resmol.train.loss_spikes import append_loss, is_spike
from resmol.train.lr_schedule import lr_at
from resmol.train.optimizer import apply_update, gradient_norm
from resmol.train.parallel import Runtime

# A re-executed step must give these again, bit for bit.
REPRODUCIBLE_FIELDS = ("loss_bits", "grad_norm_bits", "lr", "tokens", "windows")
SLOWNESS_STEPS = 10  # over which the work of several processes is compared


@dataclass
class TrainState:
    """All that changes from step to step; what is not here cannot influence the next one."""

    model: CausalLM
    optimizer: torch.optim.AdamW
    step: int = 0
    tokens_seen: int = 0
    recent_losses: tuple[float, ...] = ()  # what the next loss is compared with; see spikes.py


@dataclass(frozen=True)
class Session:
    """What one invocation of training works with; nothing in it influences the numbers but the configuration."""

    run: RunDir
    config: RunConfig
    runtime: Runtime
    loader: Loader
    held_out: Loader | None
    data_fingerprint: str
    tokenizer: Tokenizer
    journal: RunLog
    checkpointer: AsyncCheckpointer
    stop: StopSignal
    recorded: dict[int, Record] = field(default_factory=dict)  # steps that a crash took back, to be met again


def train(state: TrainState, session: Session) -> None:
    """Go on from ``state.step`` to ``config.train.steps``; evaluate, sample and save on the way.

    Raises:
        Interrupted: A signal came; the step was finished and saved.
        NonFiniteError: A loss or gradient is not finite twice in a row; the weights were not updated with it.
        CheckFailed: A step that is executed again after a crash gives other bits than the ledger recorded, or the
            loss jumped and ``train.on_spike`` is stop.
        DiskFull: A checkpoint could not be written, even after older ones were pruned.
        ProcessLost: Another process died, froze, or did not come for ``runtime.collective_timeout`` seconds.
    """
    config, runtime = session.config, session.runtime
    while state.step < config.train.steps:
        started = time.perf_counter()
        step = state.step + 1
        runtime.begin(f"step {step}")
        batches = list(session.loader.micro_batches(step, runtime.rank, runtime.world_size))
        loss, grad_norm = train_step(state, batches, session.loader.step_tokens(step), config, runtime)
        seconds = time.perf_counter() - started

        record_step(state, session, loss, grad_norm, seconds)
        spike = notice_spike(state, session, loss)
        notice_slow_process(state, session, seconds)
        stopping = runtime.any_rank(session.stop.requested)
        if not stopping and is_due(config.evaluation.every, step, config.train.steps):
            record_evaluation(state, session)
        if not stopping and is_due(config.sampling.every, step, config.train.steps):
            record_sample(state, session)
        session.checkpointer.poll()
        if stopping or session.checkpointer.should_save(step):
            save(state, session, wait=stopping or step == config.train.steps)
        if spike and config.train.on_spike == "stop":
            raise CheckFailed(
                f"the loss of step {step} is {loss:.4f}, far above the recent ones; train.on_spike is stop",
                fix="look at its windows and at the learning rate; to go on all the same: --set train.on_spike=warn",
            )
        if stopping:
            session.journal.write("stop", step=step, reason=session.stop.name or "stop in another process")
            raise Interrupted(
                f"stopped by {session.stop.name or 'another process'} after step {step}, which is saved",
                fix="run the same command again to go on",
                signal_number=session.stop.number or 15,
            )
    session.journal.write("stop", step=state.step, reason="finished")


def train_step(
    state: TrainState, batches: Sequence[Batch], tokens: int, config: RunConfig, runtime: Runtime
) -> tuple[float, float]:
    """Do one optimizer step and count it.

    Args:
        state: Model, optimizer and counters; changed in place, or not at all if this raises.
        batches: This process's micro-batches of the step.
        tokens: Targets of the step over all micro-batches and processes.
        config: Learning rate, clipping, chunking.
        runtime: Device, arithmetic and siblings.

    Returns:
        The loss in nats, a mean over all tokens of the step, and the norm of the mean gradient before clipping.
    """
    for _attempt in range(2):  # a flipped bit does not come twice; bad data or a diverged model does
        total = accumulate_gradients(state.model, batches, config, runtime)
        norm = gradient_norm(state.model, tokens)
        loss, grad_norm = float(total) / tokens, float(norm)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            break
        state.optimizer.zero_grad(set_to_none=True)
    else:
        windows = [window for batch in batches for window in batch.window_ids]
        raise NonFiniteError(
            f"step {state.step + 1} has loss {loss} and gradient norm {grad_norm}, twice (windows {windows[:16]})",
            fix="the weights are those of the step before; look at these windows, or start with a lower optimizer.lr",
        )
    learning_rate = lr_at(state.step + 1, config.schedule, config.optimizer.lr)
    apply_update(state.optimizer, lr=learning_rate, tokens=tokens, norm=norm, clip_norm=config.optimizer.clip_norm)
    state.step += 1
    state.tokens_seen += tokens
    return loss, grad_norm


def accumulate_gradients(model: CausalLM, batches: Sequence[Batch], config: RunConfig, runtime: Runtime) -> Tensor:
    """Add up the gradients of the *summed* loss over micro-batches and processes; return the summed loss."""
    total = torch.zeros((), device=runtime.device)
    for batch in batches:
        documents = None if batch.document_ids is None else batch.document_ids.to(runtime.device)
        with runtime.autocast():
            hidden, weight = model.hidden_and_output_weight(batch.input_ids.to(runtime.device), documents)
            targets = batch.targets.to(runtime.device)
            backend = model.lm_head.backend
            loss = cross_entropy_sum(hidden, weight, targets, config.runtime.loss_chunk_tokens, backend)
        loss.backward()
        total += loss.detach()
    runtime.all_reduce_sum([total, *(p.grad for p in model.parameters() if p.grad is not None)])
    return total


def is_due(every: int, step: int, last: int) -> bool:
    """Tell whether something that happens every so many steps (0: never) and at the last one happens now."""
    return every > 0 and (step % every == 0 or step == last)


def record_step(state: TrainState, session: Session, loss: float, grad_norm: float, seconds: float) -> None:
    """Write the step into the ledger; if it was executed before, it must be the same step again."""
    step, config = state.step, session.config
    record = session.journal.write(
        "step",
        step=step,
        loss=loss,
        loss_bits=float_bits(loss),
        grad_norm=grad_norm,
        grad_norm_bits=float_bits(grad_norm),
        lr=lr_at(step, config.schedule, config.optimizer.lr),
        tokens=session.loader.step_tokens(step),
        tokens_seen=state.tokens_seen,
        windows=session.loader.window_digest(step),
        epoch=session.loader.epoch_of(step),
        seconds=round(seconds, 6),
    )
    before = session.recorded.pop(step, record)
    for name in REPRODUCIBLE_FIELDS:
        if before[name] != record[name]:
            session.journal.write("warn", what="re-executed step differs", step=step, field=name)
            session.journal.sync()
            raise CheckFailed(
                f"step {step} was executed again after a crash and its {name} is {record[name]}; the ledger has "
                f"{before[name]} from the first time",
                fix="check the machine's memory and whether code, libraries or data changed since",
            )


def notice_spike(state: TrainState, session: Session, loss: float) -> bool:
    """Remember the loss, and record it when it lies far above the ones before; every process decides the same."""
    spike = is_spike(loss, state.recent_losses)
    if spike:
        median = statistics.median(state.recent_losses)
        session.journal.write("warn", what="loss spike", step=state.step, loss=loss, median=median)
    state.recent_losses = append_loss(loss, state.recent_losses)
    return spike


def notice_slow_process(state: TrainState, session: Session, seconds: float) -> None:
    """Record which of several processes the others wait for; looked at every few steps."""
    siblings = session.runtime.siblings
    if siblings is None:
        return
    siblings.count_work(seconds)
    if state.step % SLOWNESS_STEPS == 0 and (slow := siblings.slowest(session.runtime.device)):
        session.journal.write("warn", what="slow process", step=state.step, reason=slow)


def record_evaluation(state: TrainState, session: Session) -> None:
    """Measure the held-out loss, without compiled code, so that it does not depend on how training computes."""
    if session.held_out is None:
        return
    session.runtime.begin(f"the evaluation after step {state.step}")
    started = time.perf_counter()
    config = session.config
    batches = session.held_out.sequential(config.batch.micro_batch_size, config.evaluation.windows or None)
    with torch.compiler.set_stance("force_eager"):
        result = evaluate(state.model, batches, session.tokenizer.byte_lengths(), session.runtime)
    session.journal.write(
        "eval",
        step=state.step,
        split="val",
        loss=result.loss,
        bits_per_byte=result.bits_per_byte,
        tokens=result.tokens,
        bytes=result.bytes,
        seconds=round(time.perf_counter() - started, 3),
    )


def record_sample(state: TrainState, session: Session) -> None:
    """Let the model speak; its own random generator keeps this from touching anything else."""
    session.runtime.begin(f"the sample after step {state.step}")
    wish = session.config.sampling
    sampling = SamplingParams(wish.max_new_tokens, wish.temperature, wish.top_k, wish.top_p, wish.seed)
    prompt = session.tokenizer.encode(wish.prompt)[-(state.model.config.max_position_embeddings - 1) :]
    with torch.compiler.set_stance("force_eager"):
        new = list(generate(state.model, prompt, sampling, eos_id=session.tokenizer.eos_id))
    text = session.tokenizer.decode(new)
    session.journal.write("sample", step=state.step, prompt=wish.prompt, text=text, seed=wish.seed)


def save(state: TrainState, session: Session, *, wait: bool = False) -> None:
    """Write a checkpoint of this step; it becomes durable in the background, or before this returns with ``wait``.

    Only rank 0 writes.
    """
    if not session.runtime.is_main:
        return
    session.runtime.begin(f"the save of step {state.step}")
    saved = SavedState(
        step=state.step,
        tokens_seen=state.tokens_seen,
        config_sha256=session.config.sha256,
        data_fingerprint=session.data_fingerprint,
        ledger_head=session.journal.head,
        random_state=torch.get_rng_state().numpy().tobytes().hex(),
        permanent=state.step in session.config.checkpoint.permanent,
        recent_losses=state.recent_losses,
    )
    session.checkpointer.save(saved, CheckpointTensors.of(state.model, state.optimizer), wait=wait)
