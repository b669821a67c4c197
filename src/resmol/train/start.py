"""Start a run or resume it: everything that must be true before the first step, then `train`.

The order matters. The run is locked first; then the configuration is compared with the stored one, the data with
the fingerprint, the ledger with its own chain and the checkpoints with their manifests. Only then does the run go on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch._functorch.config

from resmol.config.drift import reconcile
from resmol.config.load import load_config, with_overrides
from resmol.config.run_config import RunConfig
from resmol.data.resolve import data_folder, open_or_prepare
from resmol.data.shards import Dataset, verify_shards
from resmol.data.tokenizer import Tokenizer, load_tokenizer
from resmol.errors import ConfigError, DataError, DiskFull, ProcessLost, UsageError
from resmol.model.flops import total_parameters
from resmol.run.async_save import AsyncCheckpointer
from resmol.run.checkpoint import digest_all, weight_tensors
from resmol.run.directory import RunDir
from resmol.run.ledger import Ledger, NullLedger
from resmol.run.log_writers import RunLog, View
from resmol.system.atomic_io import fsync_path, remove_leftovers, write_durable
from resmol.system.host import return_freed_memory
from resmol.system.signals import StopSignal
from resmol.train.autotune import check_memory, resolve_auto
from resmol.train.build import compile_blocks, make_loader, new_state
from resmol.train.loop import Session, TrainState, train
from resmol.train.parallel import Runtime, is_rank_zero, open_runtime
from resmol.train.resume import Beginning, begin, share_state
from resmol.version import __version__

logger = logging.getLogger(__name__)

FILES_OF_A_RUN = 12  # lock, configuration, tokenizer, ledger, log, checkpoints; and a checkpoint with its five files


def train_model(
    config: RunConfig | None,
    run: str | Path,
    *,
    data: str | None = None,
    overrides: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    accept_drift: Sequence[str] = (),
    allow_fresh: bool = False,
    strict: bool = False,
    views: Callable[[RunConfig], Sequence[View]] = lambda _: (),
) -> TrainState:
    """Start a run, or resume it bit for bit, and train it to ``train.steps``.

    Args:
        config: The configuration; None resumes with the stored one.
        run: The run directory.
        data: A prepared folder, or text to prepare on the fly; None reads what the run read before.
        overrides: ``section.key=value``, laid over the configuration.
        tokenizer: Where to find ``tokenizer.json``; None looks in the usual places.
        accept_drift: Class B fields that may differ from the stored configuration.
        allow_fresh: Begin again when every checkpoint is damaged.
        strict: Refuse an environment in which bitwise equality is not promised.
        views: Makes what shows the ledger while it grows.

    Returns:
        The state after the last step: ``model``, ``optimizer``, ``step``, ``tokens_seen``.

    Raises:
        ResmolError: Every failure is one of these, with a sentence on what to do.
    """
    directory = RunDir(Path(run))
    if data is not None:
        folder = data_folder(data, "", directory.data)
        own = folder == directory.data
        overrides = [*overrides, f"data.path={directory.data.name if own else folder.resolve()}"]

    def open_data(settled: RunConfig) -> tuple[Dataset, Tokenizer]:
        found = run_tokenizer(directory, settled, tokenizer)
        dataset = open_or_prepare(data_folder(None, settled.data.path, directory.data), data, found)
        verify_shards(dataset)
        return dataset, found

    return launch(
        Launch(
            run=directory,
            config=config,
            overrides=overrides,
            dataset=open_data,
            views=views,
            accept_drift=accept_drift,
            allow_fresh=allow_fresh,
            strict=strict,
        )
    )


def run_tokenizer(run: RunDir, config: RunConfig, source: str | Path | None) -> Tokenizer:
    """Return the tokenizer of a run: the copy in its directory if there is one."""
    own = run.tokenizer if run.tokenizer.is_file() and source is None else source
    return load_tokenizer(own, sha256=config.tokenizer.sha256)


@dataclass(frozen=True)
class Launch:
    """What the user asked for.

    Attributes:
        run: The run directory.
        config: The wanted configuration; None resumes with the stored one.
        overrides: ``section.key=value``, laid over it.
        dataset: Opens the prepared data, given the final configuration.
        views: Makes the views of the ledger, given the final configuration.
        accept_drift: Class B fields that may change.
        allow_fresh: Begin again when every checkpoint is damaged.
        strict: Refuse to go on in an environment without the bitwise promise.
    """

    run: RunDir
    config: RunConfig | None
    overrides: Sequence[str] = ()
    dataset: Callable[[RunConfig], tuple[Dataset, Tokenizer]] = field(kw_only=True)
    views: Callable[[RunConfig], Sequence[View]] = field(kw_only=True)
    accept_drift: Sequence[str] = ()
    allow_fresh: bool = False
    strict: bool = False


def launch(wanted: Launch) -> TrainState:
    """Start or resume a run and train it to ``train.steps``.

    Returns:
        The state after the last step.

    Raises:
        RunInUse: Another process is training here.
        ConfigError: The configuration is wrong, or drifted in a way that is not allowed.
        CheckpointError: The run has checkpoints, and none of them is whole.
        ResmolError: What `train` raises.
    """
    run, is_main = wanted.run, is_rank_zero()
    settle_configuration(wanted)  # a wrong argument leaves nothing behind, not even a directory
    with ExitStack() as stack:
        if is_main:
            stack.enter_context(run.lock())
        config, drifts = settle_configuration(wanted)
        opened = _open_data(wanted, config) if is_main else None  # text is prepared once, not by every process
        config, decisions = resolve_auto(config)
        for sentence in decisions:
            logger.info(sentence)
        check_memory(config)
        if config.runtime.activation_checkpointing == "on":  # then memory counts more than speed
            return_freed_memory()
        runtime = stack.enter_context(open_runtime(config))
        dataset, tokenizer = opened or _open_data(wanted, config)
        stop = stack.enter_context(StopSignal())
        state = new_state(config, runtime)
        journal, recorded = RunLog(NullLedger(), ()), {}
        if is_main:
            circumstances = Beginning(
                run, config, dataset.fingerprint, runtime.environment(), drifts, wanted.allow_fresh, wanted.strict
            )
            journal = stack.enter_context(_open_journal(wanted, config, tokenizer))
            recorded = begin(state, journal, circumstances)
            write_durable(run.config, config.to_toml().encode())  # only now is it sure that the run goes on with it
        share_state(state, runtime)
        check_siblings_agree(state, config, dataset, runtime)
        loader = make_loader(config, dataset.train)
        held_out = make_loader(config, dataset.val) if len(dataset.val) > config.data.seq_len else None
        if held_out is None and config.evaluation.every:
            logger.info(
                f"evaluation: none, since {len(dataset.val)} held-out tokens are no window of {config.data.seq_len}"
            )
        saver = stack.enter_context(
            AsyncCheckpointer(run.checkpoints, config.checkpoint.keep_last, journal, state.parent)
        )
        session = Session(
            run, config, runtime, loader, held_out, dataset.fingerprint, tokenizer, journal, saver, stop, recorded
        )
        compile_blocks(state.model, config)
        try:
            train(state, session)
        except ProcessLost as error:
            journal.write("warn", what="a collective failed", step=state.step, reason=error.what)
            raise
    return state


def settle_configuration(wanted: Launch) -> tuple[RunConfig, dict[str, Any]]:
    """Return the configuration to run with, and the accepted drifts from the stored one."""
    run = wanted.run
    if not run.exists():
        if wanted.config is None:
            raise UsageError(
                f"{run.path} is a new run, and neither a preset nor a configuration was given",
                fix="add --preset nano (or another preset, or --config FILE)",
            )
        return with_overrides(wanted.config, wanted.overrides), {}
    stored = load_config(run.config)
    asked = with_overrides(wanted.config or stored, wanted.overrides)
    if not asked.data.path:  # a preset does not say where the data lies; the run does
        asked = with_overrides(asked, [f"data.path={json.dumps(stored.data.path, ensure_ascii=False)}"])
    return reconcile(stored, asked, wanted.accept_drift)


def check_siblings_agree(state: TrainState, config: RunConfig, dataset: Dataset, runtime: Runtime) -> None:
    """Compare what the processes are about to work on (`ConfigError` when it is not the same)."""
    if runtime.monitor is None:
        return
    weights = json.dumps(digest_all(weight_tensors(state.model)), sort_keys=True)
    facts = {
        "version of resmol": __version__,
        "version of PyTorch": torch.__version__,
        "configuration": config.sha256,
        "data fingerprint": dataset.fingerprint,
        "step": str(state.step),
        "weights": hashlib.sha256(weights.encode()).hexdigest(),
    }
    runtime.monitor.check_consistent(facts)


# --- what is checked before anything is written --------------------------------------------------------------


def _open_data(wanted: Launch, config: RunConfig) -> tuple[Dataset, Tokenizer]:
    dataset, tokenizer = wanted.dataset(config)
    if dataset.tokenizer_sha256 != config.tokenizer.sha256:
        raise ConfigError(
            f"the data was made with tokenizer {dataset.tokenizer_sha256[:12]}; this run wants "
            f"{config.tokenizer.sha256[:12]}",
            fix="prepare the text again with the run's tokenizer, or state the other one with "
            f"--set tokenizer.sha256={dataset.tokenizer_sha256}",
        )
    if dataset.vocab_size > config.model.vocab_size or dataset.eos_id != config.model.eos_token_id:
        raise ConfigError(
            f"the tokenizer has {dataset.vocab_size} entries and ends documents with {dataset.eos_id}; the model has "
            f"{config.model.vocab_size} and {config.model.eos_token_id}",
            fix="set model.vocab_size and model.eos_token_id to the tokenizer's",
        )
    return dataset, tokenizer


def _check_disk(run: RunDir, config: RunConfig) -> None:
    needed = 3 * 4 * total_parameters(config.model)
    run.path.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(run.path).free
    if free < needed:
        raise DiskFull(
            f"a checkpoint needs {needed:,} bytes; {run.path} has {free:,} free",
            fix="free some space, or choose a run directory on another disk",
        )
    disk = os.statvfs(run.path)
    if disk.f_files > 0 and disk.f_favail < FILES_OF_A_RUN:  # some file systems have no such limit, and say 0
        raise DiskFull(
            f"a run and a checkpoint need {FILES_OF_A_RUN} inodes; {run.path} has {disk.f_favail} free",
            fix="remove some files, or choose a run directory on another disk",
        )
    for folder in (run.path, run.checkpoints):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise DataError(
                f"{folder} cannot be written", fix="check its permissions, and whether the disk is read-only"
            )


@contextmanager
def _open_journal(wanted: Launch, config: RunConfig, tokenizer: Tokenizer) -> Iterator[RunLog]:
    """Make the run directory ready and open its ledger; a new run gets its configuration before its first record."""
    run = wanted.run
    _check_disk(run, config)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    fsync_path(run.path)
    remove_leftovers(run.checkpoints)
    remove_leftovers(run.path)
    if not run.tokenizer.exists():
        write_durable(run.tokenizer, tokenizer.data)
    if not run.exists():
        write_durable(run.config, config.to_toml().encode())
    views = wanted.views(config)
    journal = RunLog(Ledger(run.ledger), views)
    try:
        yield journal
    finally:
        journal.close()
