"""Where a run begins: at its first step, or after the newest whole checkpoint; and what the ledger records of that.

After a crash the ledger is ahead of the checkpoint. The steps in between are taken back with a ``rewind`` record and
executed again; the loop compares their bits with the recorded ones, so every crash is a test of determinism.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from resmol.config.run_config import RunConfig
from resmol.errors import CheckFailed, CheckpointError, ConfigError, UsageError
from resmol.model.flops import total_parameters
from resmol.run.checkpoint import quarantine
from resmol.run.checkpoint_load import load_into, load_tensors
from resmol.run.checkpoint_manifest import (
    AVERAGED,
    MANIFEST,
    STATE,
    Checkpoint,
    corrupt,
    list_checkpoints,
    newest_valid,
    open_checkpoint,
)
from resmol.run.directory import RunDir
from resmol.run.fingerprint import Fingerprint, hexadecimal, is_of_step
from resmol.run.ledger import (
    FORMAT,
    Record,
    comparable_steps,
    effective_saves,
    effective_steps,
    is_finished,
    last_fact,
    select,
)
from resmol.run.log_writers import RunLog
from resmol.run.ranks import ONE_RANK, Ranks
from resmol.system.wording import in_words
from resmol.train.step import TrainState
from resmol.version import __version__

logger = logging.getLogger(__name__)

BITWISE_FACTS = ("torch", "system", "processor", "cpu_capability", "mkl", "threads", "device")


def changed_facts(before: Record, now: Record, config: RunConfig) -> dict[str, Record]:
    """Return the facts, of those that must be equal for equal bits, that differ between two environments.

    The sum over micro-batches has another order when other ranks share them; a sum of two has only one. Ranks that
    share the weights (FSDP) add up the norm of the gradient, and thereby the factor of clipping, in parts of their own.
    A portable run has the same bits on another processor: `portable.require_portable` saw to the kernels.
    """
    before, now = ({"sharding": "none", **environment} for environment in (before, now))
    facts = [*BITWISE_FACTS, "sharding"]
    if config.runtime.determinism == "portable":
        facts.remove("processor")
    if config.grad_accum_steps > 2 or before["sharding"] != "none":
        facts.append("world_size")
    return {
        fact: {"from": before.get(fact), "to": now.get(fact)} for fact in facts if before.get(fact) != now.get(fact)
    }


def resume_or_start(
    state: TrainState,
    run_log: RunLog,
    run: RunDir,
    config: RunConfig,
    drifts: dict[str, Any],
    data: Record,
    environment: dict[str, str | int],
    ranks: Ranks = ONE_RANK,
    *,
    allow_fresh: bool = False,
    strict: bool = False,
) -> Checkpoint | None:
    """Bring ``state`` to where the run stands, and record how.

    All ranks call it: rank 0 decides and records, and each rank reads from the checkpoint what it holds of the state.

    Args:
        state: Initial weights; filled from a checkpoint if there is one.
        run_log: The open ledger of the run.
        run: The run directory.
        config: The configuration to go on with, without ``auto``.
        drifts: Its accepted changes from the recorded one, ``key -> {"from": ..., "to": ...}``.
        data: What the ledger records of the data at hand: its fingerprint, and the sources of a mixture.
        environment: Facts about machine and libraries.
        ranks: The ranks of the run.
        allow_fresh: Begin again when every checkpoint is corrupt.
        strict: Refuse an environment in which bitwise equality is not promised.

    Returns:
        The checkpoint that the run goes on from; None at its beginning.

    Raises:
        CheckpointError: The run saved checkpoints, and none of them is whole.
        ConfigError: The data or, with ``strict``, the environment is not that of the run.
        CheckFailed: The ledger is older than the checkpoint, or the checkpoint is that of another run.
        UsageError: The run is already past the last step that is asked for.
    """
    facts = {"environment": environment, "config_sha256": config.sha256}
    checkpoint, added = None, dict[str, Any]()
    begins = not run_log.records
    if ranks.rank == 0:
        if begins:
            _record_start(run_log, run, config, **data, **facts)
        else:
            added = _check_data(run_log.records, data)
            _compare_environment(run_log, config, environment, strict=strict)
            checkpoint = _find_checkpoint(run_log, run, config, allow_fresh=allow_fresh)
    checkpoint = _share_checkpoint(checkpoint, run, ranks)
    if checkpoint is not None:
        restore(state, checkpoint, ranks)
        _check_fingerprint(run_log.records, state, checkpoint)
    if ranks.rank or begins:
        return checkpoint
    run.write_config(config)
    if state.step == config.train.steps and not (drifts or added) and is_finished(run_log.records, state.step):
        logger.info(f"nothing to do: the run is at step {state.step}; --steps with a larger number goes on")
    else:
        _record_resume(run_log, checkpoint, drifts, facts, added)
    return checkpoint


def steps_to_repeat(records: list[Record], config: RunConfig, step: int) -> dict[int, Record]:
    """Return the newest executions of the steps after ``step``, which must give the same bits when they come again.

    There are none where bitwise equality is not promised.
    """
    if config.runtime.determinism == "off":
        return {}
    return {number: record for number, record in comparable_steps(records).items() if number > step}


def restore(state: TrainState, checkpoint: Checkpoint, ranks: Ranks = ONE_RANK) -> None:
    """Fill ``state`` from a verified checkpoint (`CheckpointError` when it is that of another model or state)."""
    state.fingerprint.forget()
    load_into(checkpoint, state.model, state.optimizer, ranks)
    if state.average is not None:
        load_tensors(checkpoint, AVERAGED, state.average.tensors, ranks)
    saved = checkpoint.state
    try:
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(saved.random_state), dtype=torch.uint8))
    except (ValueError, RuntimeError):
        raise corrupt(checkpoint.path / STATE, "holds no state of PyTorch's random generator") from None
    state.step, state.tokens_seen, state.windows_seen = saved.step, saved.tokens_seen, saved.windows_seen
    state.recent_losses, state.loss_scale, state.mixture = saved.recent_losses, saved.loss_scale, saved.mixture
    found = Fingerprint.of(state.tensors().files)
    if saved.fingerprint is not None and found.is_whole() and saved.fingerprint != hexadecimal(found.sum()):
        raise corrupt(checkpoint.path, "holds other weights or moments than were in memory when it was saved")


def _record_start(run_log: RunLog, run: RunDir, config: RunConfig, **facts: Any) -> None:
    if list_checkpoints(run.checkpoints):
        raise CheckFailed(
            f"{run.path} has checkpoints but an empty ledger: its record is lost",
            fix="restore ledger.jsonl from a copy, or start a new run directory",
        )
    run.write_config(config)
    run_log.write(
        "start",
        format=FORMAT,
        version=__version__,
        name=config.name,
        config=config.bound_fields(),
        parameters=total_parameters(config.model),
        **facts,
    )
    run_log.sync()


def _check_data(records: list[Record], data: Record) -> Record:
    """Return what to record of the data: nothing unless sources were added (`ConfigError`: it is other data)."""
    if "sources" in data:
        return data if _check_sources(records, data["sources"]) else {}
    recorded, fingerprint = next(select(records, "start"))["data_fingerprint"], data["data_fingerprint"]
    if recorded != fingerprint:
        raise ConfigError(
            f"the data has fingerprint {fingerprint[:12]}; the run was started on {recorded[:12]}",
            fix="name the data that the run was started with, or start a new run directory",
        )
    return {}


def _check_sources(records: list[Record], sources: Sequence[Record]) -> bool:
    """Return whether sources were added to those that the ledger recorded last (`ConfigError`: others are not those).

    The windows of all sources are numbered through, so a source that was read keeps its place.
    """
    known = last_fact(records, "sources")
    for number, before in enumerate(known):
        now = sources[number] if number < len(sources) else {"name": "missing"}
        if now["name"] != before["name"]:
            raise ConfigError(
                f"source {number + 1} of this run is {before['name']}; now it is {now['name']}",
                fix="keep the sources of a run in their order and add new ones at the end; one that is to be read no "
                "more gets no weight in a [[data.stage]]",
            )
        if now["fingerprint"] != before["fingerprint"]:
            raise ConfigError(
                f"the source {now['name']} has fingerprint {now['fingerprint'][:12]}; the run has read "
                f"{before['fingerprint'][:12]}",
                fix="name the folder that the run was started with, or start a new run directory",
            )
    return len(sources) > len(known)


def _compare_environment(
    run_log: RunLog, config: RunConfig, environment: dict[str, str | int], *, strict: bool
) -> None:
    """Record where bitwise equality with what came before is not promised (`ConfigError` if ``strict``)."""
    before = last_fact(run_log.records, "environment")
    changed = changed_facts(before, environment, config)
    if changed and strict:
        raise ConfigError(
            f"the environment changed, so bitwise equality is not promised: {in_words(changed)}",
            fix="go back to the environment of the run, or leave out --strict",
        )
    if changed:
        what = "environment changed: bitwise equality is not promised from here"
        run_log.write("warn", what=what, changes=changed, environment=environment)


def _find_checkpoint(run_log: RunLog, run: RunDir, config: RunConfig, *, allow_fresh: bool) -> Checkpoint | None:
    """Return the checkpoint to go on from, one of this run and not past its end; None at the run's beginning."""
    checkpoint = _newest_whole(run_log, run, allow_fresh=allow_fresh)
    if checkpoint is None:
        return None
    _check_bindings(run_log, checkpoint)
    step = checkpoint.state.step
    if step > config.train.steps:
        raise UsageError(
            f"the run is at step {step}; --steps {config.train.steps} lies before it",
            fix=f"give --steps {step} or more, or start a new run directory",
        )
    return checkpoint


def _share_checkpoint(checkpoint: Checkpoint | None, run: RunDir, ranks: Ranks) -> Checkpoint | None:
    """Return on every rank the checkpoint that rank 0 has found and verified.

    Raises:
        CheckpointError: This rank finds another one under its name.
        DataError: This rank cannot read it.
    """
    found = None if checkpoint is None else [checkpoint.path.name, checkpoint.manifest.sha256]
    found = ranks.exchange("choose a checkpoint", found)[0]
    if checkpoint is not None or found is None:
        return checkpoint
    name, sha256 = found
    checkpoint = open_checkpoint(run.checkpoints / name)
    if checkpoint.manifest.sha256 != sha256:
        raise corrupt(checkpoint.path / MANIFEST, f"is not the one that rank 0 reads ({sha256[:12]})")
    return checkpoint


def _newest_whole(run_log: RunLog, run: RunDir, *, allow_fresh: bool) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None where the run had not saved any yet.

    Those that are skipped lose their name: they would count as the newest in retention, and stop the next save.
    """
    recorded = {name: record["manifest_sha256"] for name, record in effective_saves(run_log.records).items()}
    folder = run.checkpoints
    if not recorded and not list_checkpoints(folder):
        return None
    try:
        checkpoint, skipped = newest_valid(folder, recorded)
    except CheckpointError as error:
        if not allow_fresh:
            raise
        reason = error.what.replace(f"{folder}", folder.name)  # the ledger may be published; places of a machine stay
        run_log.write("warn", what="no valid checkpoint: beginning again, as allowed", reason=reason)
        for path in list_checkpoints(folder):
            quarantine(path)
        return None
    for item in skipped:
        run_log.write("warn", what="checkpoint skipped", checkpoint=item.path.name, reason=item.reason)
        quarantine(item.path)
    return checkpoint


def _check_bindings(run_log: RunLog, checkpoint: Checkpoint) -> None:
    """Compare what a checkpoint is bound to with the ledger: its head, configuration and data at that time."""
    records, name = run_log.records, checkpoint.path.name
    heads = [*(record["prev"] for record in records), run_log.head]
    if checkpoint.state.ledger_head not in heads:
        raise CheckFailed(
            f"the ledger ends before {name} was saved: it is an older copy",
            fix="restore the newer ledger.jsonl, or move the newer checkpoints away and go on from an older one",
        )
    position = heads.index(checkpoint.state.ledger_head)
    for field in ("config_sha256", "data_fingerprint"):
        found, recorded = getattr(checkpoint.state, field), last_fact(records[:position], field)
        if found != recorded:
            raise CheckFailed(
                f"{name} is no checkpoint of this run: its {field} is {found[:12]}, and the ledger recorded "
                f"{str(recorded)[:12]} before it was saved",
                fix="move it out of the run, which then goes on from the checkpoint before",
            )


def _check_fingerprint(records: list[Record], state: TrainState, checkpoint: Checkpoint) -> None:
    """Compare what was loaded with what the step of the checkpoint recorded of its weights and moments."""
    recorded = effective_steps(records).get(state.step, {}).get("fingerprint")
    found = Fingerprint.of(state.tensors().files)
    if recorded is not None and found.is_whole() and not is_of_step(recorded, state.step, found):
        raise CheckFailed(
            f"{checkpoint.path.name} does not hold the weights and moments that step {state.step} recorded: its "
            f"fingerprint is not {recorded}",
            fix="restore the checkpoint from a copy, or move it out of the run, which then goes on from the one before",
        )


def _record_resume(
    run_log: RunLog,
    checkpoint: Checkpoint | None,
    drifts: dict[str, Any],
    facts: dict[str, Any],
    added: dict[str, Any],
) -> None:
    """Take back the steps that are not in the checkpoint; record what changed, and from where the run goes on."""
    step = 0 if checkpoint is None else checkpoint.state.step
    last = max(effective_steps(run_log.records), default=0)
    if last > step:
        run_log.write("rewind", from_step=last, to_step=step)
    if drifts or added:
        run_log.write("drift", changes=drifts, config_sha256=facts["config_sha256"], **added)
    if checkpoint is not None:
        name, sha256 = checkpoint.path.name, checkpoint.manifest.sha256
        run_log.write("resume", step=step, next_step=step + 1, checkpoint=name, manifest_sha256=sha256, **facts)
    run_log.sync()
