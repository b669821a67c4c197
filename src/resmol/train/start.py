"""Start a run or resume it: everything that must be true before the first step, in order, then `train`.

The arguments make a configuration; this process alone holds the run; the data is the run's and fits its model; memory
and disk suffice; the ledger's chain, the checkpoint and the configuration belong together; all ranks agree.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from resmol.config.run_config import RunConfig
from resmol.data.resolve import Text
from resmol.data.sources import Mixture, RunData
from resmol.data.tokenizer import Tokenizer, load_tokenizer
from resmol.errors import ProcessLost, UsageError
from resmol.run.async_save import AsyncCheckpointer
from resmol.run.checkpoint import digest_all, weight_tensors
from resmol.run.checkpoint_manifest import Checkpoint, corrupt
from resmol.run.directory import RunDir
from resmol.run.ledger import Ledger, NullLedger, Record
from resmol.run.log_writers import LogWriter, RunLog
from resmol.run.mirror import Mirror, find_mirror
from resmol.run.mirror_places import MirrorPlace, mirror_place
from resmol.run.progress import Progress, run_log_writers, shown_messages
from resmol.system.host import return_freed_memory
from resmol.system.launcher import this_launch
from resmol.system.locks import exclusive_lock
from resmol.system.signals import StopSignal
from resmol.system.wording import counted
from resmol.train.autotune import check_memory, check_memory_before_deciding, resolve_auto
from resmol.train.build import (
    choose_prompt,
    compile_blocks,
    make_loader,
    make_val_loader,
    mixture_order,
    new_state,
    open_run_data,
)
from resmol.train.compiler import broken_compiler, first_sentence, require_compiler
from resmol.train.devices import find_device
from resmol.train.gradients import replicated
from resmol.train.loop import Session, train
from resmol.train.lr_schedule import decay_over, end_of_decay
from resmol.train.overfitting import announce_repetition
from resmol.train.parallel import Runtime, check_ranks, open_runtime
from resmol.train.portable import require_portable
from resmol.train.request import requested_changes, resolve_config, tokenizer_of_data
from resmol.train.resume import resume_or_start, steps_to_repeat
from resmol.train.state_fingerprint import whole_fingerprint
from resmol.train.step import TrainState
from resmol.train.supply import announce_mixture, check_supply
from resmol.version import __version__

logger = logging.getLogger(__name__)


def train_model(
    config: RunConfig | None,
    run: str | Path,
    *,
    data: str | Text | None = None,
    overrides: Sequence[str] = (),
    epochs: float | None = None,
    tokenizer: str | Path | None = None,
    accept_drift: Sequence[str] = (),
    allow_fresh: bool = False,
    strict: bool = False,
    mirror: str | None = None,
    progress: Progress = "auto",
    log_writers: Callable[[RunConfig], Sequence[LogWriter]] = lambda _: (),
) -> TrainState:
    """Start a run, or resume it bit for bit; train it to ``train.steps`` and return the state after the last step.

    Args:
        config: The configuration; None resumes with the stored one.
        run: The run directory.
        data: A prepared folder, or text to prepare on the fly (`Text` says how); None reads what the run read before.
        overrides: ``section.key=value``, laid over the configuration.
        epochs: Train for so many passes over the data instead of ``train.steps``.
        tokenizer: A ``tokenizer.json``, a folder that holds one, or a Hub id; None takes that of the run, of the
            prepared data, or SmolLM2's. A new run gets the vocabulary that fits it (`vocabulary.with_vocabulary`).
        accept_drift: Class B fields that may differ from the stored configuration.
        allow_fresh: Begin again when every checkpoint is corrupt.
        strict: Refuse an environment in which bitwise equality is not promised.
        mirror: A folder or ``hf://OWNER/NAME`` to copy each checkpoint to, and a run that is not here back from.
        progress: Whether to show steps and messages; ``"auto"`` does at a terminal and in a notebook.
        log_writers: Makes further views of the ledger, beside ``train.log``, given the resolved configuration.

    Raises:
        ResmolError: Every failure is one of these, with a sentence on what to do.
    """
    directory, is_rank_zero = RunDir(Path(run)), this_launch().rank == 0
    place = _find_mirror(mirror, directory) if mirror is not None and is_rank_zero else None
    text = Text(inputs=(data,)) if isinstance(data, str) else data
    changes = requested_changes(directory, text, overrides, epochs)
    named = load_tokenizer(tokenizer) if tokenizer is not None else tokenizer_of_data(directory, config, changes)
    resolve = partial(resolve_config, directory, config, changes, accept_drift, named)
    asked = resolve()[0]
    _check_epochs(asked, epochs)
    check_memory_before_deciding(asked)  # what cannot be leaves nothing behind, not even a directory
    with shown_messages(progress), ExitStack() as stack:
        stack.enter_context(exclusive_lock(directory.lock) if is_rank_zero else nullcontext())
        requested, drifts = resolve()  # again: from here on no other process changes the run
        _check_here(requested, directory if is_rank_zero else None)
        open_data = partial(open_run_data, directory, requested, text, named)
        opened = open_data() if is_rank_zero or epochs else None  # text is prepared once, not by every rank
        resolved = decide_auto(with_epochs(requested, epochs, opened[0]) if opened and epochs else requested)
        runtime = stack.enter_context(open_runtime(resolved))
        run_data, own_tokenizer = opened or open_data()
        resolved = choose_prompt(resolved, run_data, own_tokenizer)
        return _train(*_open_session(
            stack, directory, resolved, drifts, run_data, own_tokenizer, runtime,
            lambda config: [*run_log_writers(directory, config, progress), *log_writers(config)],
            place, allow_fresh=allow_fresh, strict=strict,
        ))  # fmt: skip


def _find_mirror(mirror: str, run: RunDir) -> MirrorPlace:
    place = mirror_place(mirror)
    with exclusive_lock(run.lock):
        find_mirror(place, run)
    return place


def _check_here(config: RunConfig, run: RunDir | None) -> None:
    """Refuse, before data is prepared and anything decided, what this place cannot do; ``run`` is to be written."""
    if run is not None:
        run.check_place(config)
        _warn_of_idle_steps(config)
    check_ranks(config, this_launch().world_size)
    require_compiler(config, find_device(config.runtime.device).type)
    require_portable(config)


def _warn_of_idle_steps(config: RunConfig) -> None:
    """Warn where steps are asked for that change nothing, since the learning rate has decayed to 0 before."""
    end, steps = end_of_decay(config.schedule), config.train.steps
    if end is None or steps <= end:
        return
    changes = {"horizon": steps}
    if config.schedule.kind == "wsd":
        changes = dict(zip(("decay_start", "decay_steps"), decay_over(config.schedule, steps), strict=True))
    options = " ".join(f"--set schedule.{key}={value}" for key, value in changes.items())
    logger.warning(
        f"the learning rate is 0 from step {end:,} on, where its decay ends: of {steps:,} steps those after it change "
        f"nothing; a new run of that length takes {options}"
    )


def _check_epochs(config: RunConfig, epochs: float | None) -> None:
    """Refuse to count passes over a mixture, whose sources end after different numbers of steps (`UsageError`)."""
    if epochs is not None and config.data.source is not None:
        raise UsageError(
            "--epochs counts passes over one text, and a mixture is of several", fix="say when to stop with --steps"
        )


def with_epochs(config: RunConfig, epochs: float, data: RunData) -> RunConfig:
    """Return the configuration that stops after so many passes over the training part, at the batch that it states."""
    loader = make_loader(config, data.train)
    steps = math.ceil(epochs * loader.n_windows / loader.windows_per_step)
    logger.info(f"epochs: {epochs:g} of {counted(loader.n_windows, 'window')} are {counted(steps, 'step')}")
    return config.replace({"train.steps": steps})


def _open_session(
    stack: ExitStack,
    run: RunDir,
    config: RunConfig,
    drifts: dict[str, Any],
    data: RunData,
    tokenizer: Tokenizer,
    runtime: Runtime,
    log_writers: Callable[[RunConfig], Sequence[LogWriter]],
    place: MirrorPlace | None,
    *,
    allow_fresh: bool,
    strict: bool,
) -> tuple[TrainState, Session]:
    """Open the record of the run on rank 0, and bring the state of every rank to where the run stands."""
    stop = stack.enter_context(StopSignal("this step is finished, then saved; the same command goes on"))
    state = new_state(config, runtime)
    run_log = RunLog(NullLedger(), ())
    facts: Record = {"data_fingerprint": data.fingerprint}
    if isinstance(data, Mixture):
        facts["sources"] = data.facts(config.data.seq_len)
    ranks = runtime.ranks()
    if this_launch().rank == 0:
        run.prepare(config, tokenizer.data)
        run_log = stack.enter_context(closing(RunLog(Ledger(run.ledger), log_writers(config))))
    run.check_shared(ranks)
    checkpoint = resume_or_start(
        state, run_log, run, config, drifts, facts, runtime.environment(), ranks, allow_fresh=allow_fresh, strict=strict
    )
    check_ranks_agree(state, config, data.fingerprint, runtime)
    if checkpoint is not None:
        check_shards(state, checkpoint, runtime)
    if runtime.world_size > 1 and runtime.mesh is None:
        state.ddp = replicated(state.model, runtime)
    order = mixture_order(config, data, state.step, state.mixture)
    check_supply(config, order, state.step)
    announce_mixture(config, order)
    mirror = None if place is None else stack.enter_context(closing(Mirror(place, run, run_log)))
    if mirror is not None and checkpoint is not None:
        mirror.request()
    checkpointer = stack.enter_context(AsyncCheckpointer(run.checkpoints, config, run_log, checkpoint, mirror, ranks))
    return state, Session(
        run, config, runtime, make_loader(config, data.train, order), make_val_loader(config, data.val),
        data.fingerprint, tokenizer, run_log, checkpointer, stop, steps_to_repeat(run_log.records, config, state.step),
    )  # fmt: skip


def decide_auto(config: RunConfig) -> RunConfig:
    """Return the configuration without ``auto`` (`ConfigError` when the run does not fit into memory)."""
    resolved, choices = resolve_auto(config)
    for sentence in choices:
        logger.info(sentence)
    check_memory(resolved)
    if resolved.runtime.activation_checkpointing == "on":  # then memory counts more than speed
        return_freed_memory()
    return resolved


def check_ranks_agree(state: TrainState, config: RunConfig, data_fingerprint: str, runtime: Runtime) -> None:
    """Compare what the ranks are about to work on (`ConfigError` when it is not the same)."""
    if runtime.monitor is None:
        return
    shares = {} if runtime.mesh is not None else weight_tensors(state.model)  # those of ranks differ
    weights = json.dumps(digest_all(shares), sort_keys=True)
    facts = {
        "version of resmol": __version__,
        "version of PyTorch": torch.__version__,
        "configuration": config.sha256,
        "data fingerprint": data_fingerprint,
        "step": str(state.step),
        "weights": hashlib.sha256(weights.encode()).hexdigest(),
    }
    runtime.monitor.check_consistent(facts)


def check_shards(state: TrainState, checkpoint: Checkpoint, runtime: Runtime) -> None:
    """Compare what ranks that share the model have read, together, with what was saved (`CheckpointError`).

    A rank that has all of it has compared by itself (`resume.restore`).
    """
    saved = checkpoint.state.fingerprint
    if runtime.mesh is not None and saved not in (None, whole_fingerprint(state.tensors(), runtime)):
        raise corrupt(checkpoint.path, "holds other weights or moments than the ranks have read from it")


def _train(state: TrainState, session: Session) -> TrainState:
    announce_repetition(session.config, session.loader, state.step, state.windows_seen)
    compile_blocks(state.model, session.config)
    try:
        train(state, session)
    except TorchDynamoException as error:  # the compiler worked for a line of code, but not for a block
        raise broken_compiler(first_sentence(error)) from error
    except ProcessLost as error:
        session.run_log.write("warn", what="a collective failed", step=state.step, reason=error.what)
        raise
    return state
