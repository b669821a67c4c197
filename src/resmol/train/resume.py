"""How an invocation begins: fresh, or from the newest whole checkpoint, and what the ledger says about it.

After a crash the ledger is ahead of the checkpoint. The steps in between are taken back with a ``rewind`` record and
executed again; the loop compares their bits with the recorded ones, so every crash is a test of determinism.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resmol.config.run_config import RunConfig
from resmol.errors import CheckFailed, CheckpointError, ConfigError, UsageError
from resmol.model.flops import total_parameters
from resmol.run.checkpoint import MOMENTS, load_optimizer, load_weights, quarantine
from resmol.run.checkpoint_manifest import STATE, damaged, list_checkpoints, load_state, newest_valid
from resmol.run.directory import RunDir
from resmol.run.ledger import FORMAT, Record, comparable_steps, effective_saves, effective_steps, last_fact, select
from resmol.run.log_writers import RunLog
from resmol.train.loop import TrainState
from resmol.train.loss_spikes import HISTORY
from resmol.train.parallel import Runtime
from resmol.version import __version__

BITWISE_FACTS = ("torch", "system", "processor", "cpu_capability", "threads", "device")


@dataclass(frozen=True)
class Beginning:
    """The circumstances of an invocation.

    Attributes:
        run: The run directory.
        config: The configuration, without ``auto``.
        data_fingerprint: That of the data at hand.
        environment: Facts about machine and libraries.
        drifts: Accepted changes of the configuration.
        allow_fresh: Begin again when every checkpoint is damaged.
        strict: Refuse an environment in which bitwise equality is not promised.
    """

    run: RunDir
    config: RunConfig
    data_fingerprint: str
    environment: dict[str, str | int]
    drifts: dict[str, Any]
    allow_fresh: bool = False
    strict: bool = False


def bitwise_facts(config: RunConfig) -> tuple[str, ...]:
    """Return the facts of which all must be equal for equal bits; a difference is recorded, and the promise is void.

    The sum over micro-batches has another order when other processes share them; a sum of two has only one.
    """
    return (*BITWISE_FACTS, "world_size") if config.grad_accum_steps > 2 else BITWISE_FACTS


def begin(state: TrainState, journal: RunLog, beginning: Beginning) -> dict[int, Record]:
    """Bring ``state`` to where the run stands and record how.

    Returns:
        The newest executions of the steps after that point: they come again and must give the same bits. Empty
        where bitwise equality is not promised.

    Raises:
        CheckpointError: The run saved checkpoints, and none of them is whole.
        ConfigError: The data, or in strict mode the environment, is not that of the run.
        CheckFailed: The ledger is older than the checkpoint.
        UsageError: The run is already past the last step that is asked for.
    """
    facts = {"environment": beginning.environment, "config_sha256": beginning.config.sha256}
    if not journal.records:
        _record_start(journal, beginning, facts)
        return {}
    _check_fingerprint(journal.records, beginning.data_fingerprint)
    comparable = _compare_environment(journal, beginning) and not beginning.drifts
    checkpoint = _find_checkpoint(journal, beginning)
    if checkpoint is not None:
        restore(state, checkpoint)
        _check_ledger_reaches(journal, checkpoint)
    if state.step > beginning.config.train.steps:
        raise UsageError(
            f"the run is at step {state.step}; --steps {beginning.config.train.steps} lies before it",
            fix=f"give --steps {state.step} or more, or start a new run directory",
        )
    _rewind(journal, state.step)
    again = {step: record for step, record in comparable_steps(journal.records).items() if step > state.step}
    if beginning.drifts:
        journal.write("drift", changes=beginning.drifts, config_sha256=beginning.config.sha256)
    if checkpoint is not None:
        journal.write(
            "resume",
            step=state.step,
            next_step=state.step + 1,
            checkpoint=checkpoint.name,
            manifest_sha256=state.parent,
            **facts,
        )
    journal.sync()
    return again if comparable else {}


def restore(state: TrainState, checkpoint: Path) -> None:
    """Fill ``state`` from a verified checkpoint (`CheckpointError` when it is that of another model)."""
    saved, manifest_sha256 = load_state(checkpoint)
    load_weights(checkpoint, state.model)
    load_optimizer(checkpoint, state.model, state.optimizer)
    try:
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(saved.random_state), dtype=torch.uint8))
    except (ValueError, RuntimeError):
        raise damaged(checkpoint / STATE, "holds no state of PyTorch's random generator") from None
    state.step, state.tokens_seen, state.parent = saved.step, saved.tokens_seen, manifest_sha256
    state.recent_losses = saved.recent_losses


def share_state(state: TrainState, runtime: Runtime) -> None:
    """Bring the other processes to where the main one stands: counters, weights and moments."""
    counters = torch.tensor([state.step, state.tokens_seen], device=runtime.device)
    runtime.broadcast([counters])
    state.step, state.tokens_seen = (int(number) for number in counters)
    losses = torch.full((HISTORY,), math.nan, dtype=torch.float64, device=runtime.device)
    losses[: len(state.recent_losses)] = torch.tensor(state.recent_losses, dtype=torch.float64)
    runtime.broadcast([losses])
    state.recent_losses = tuple(loss for loss in losses.tolist() if not math.isnan(loss))
    runtime.broadcast(parameter.data for parameter in state.model.parameters())
    if state.step == 0:
        return  # the optimizer has no moments yet
    for parameter in state.model.parameters():
        if parameter not in state.optimizer.state:
            moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            step = torch.tensor(float(state.step), device=runtime.device)
            state.optimizer.state[parameter] = {"step": step, **moments}
        runtime.broadcast(state.optimizer.state[parameter][moment] for moment in MOMENTS)


def _record_start(journal: RunLog, beginning: Beginning, facts: dict[str, Any]) -> None:
    if list_checkpoints(beginning.run.checkpoints):
        raise CheckFailed(
            f"{beginning.run.path} has checkpoints but an empty ledger: its record is lost",
            fix="restore ledger.jsonl from a copy, or start a new run directory",
        )
    journal.write(
        "start",
        format=FORMAT,
        version=__version__,
        name=beginning.config.name,
        data_fingerprint=beginning.data_fingerprint,
        parameters=total_parameters(beginning.config.model),
        **facts,
    )
    journal.sync()


def _check_fingerprint(records: list[Record], fingerprint: str) -> None:
    recorded = next(select(records, "start"))["data_fingerprint"]
    if recorded != fingerprint:
        raise ConfigError(
            f"the data has fingerprint {fingerprint[:12]}; the run was started on {recorded[:12]}",
            fix="name the data that the run was started with, or start a new run directory",
        )


def _compare_environment(journal: RunLog, beginning: Beginning) -> bool:
    """Tell whether bitwise equality with what came before is promised; record it where it is not."""
    before, now = last_fact(journal.records, "environment"), beginning.environment
    changed = {
        fact: {"from": before.get(fact), "to": now[fact]}
        for fact in bitwise_facts(beginning.config)
        if before.get(fact) != now[fact]
    }
    if changed and beginning.strict:
        raise ConfigError(
            f"the environment changed, so bitwise equality is not promised: {changed}",
            fix="go back to the environment of the run, or leave out --strict",
        )
    if changed:
        what = "environment changed: bitwise equality is not promised from here"
        journal.write("warn", what=what, changes=changed, environment=now)
    return not changed


def _find_checkpoint(journal: RunLog, beginning: Beginning) -> Path | None:
    """Return the newest whole checkpoint, or None where the run had not saved any yet.

    Those that are passed over lose their name: they would count as the newest in retention, and stop the next save.
    """
    recorded = {name: record["manifest_sha256"] for name, record in effective_saves(journal.records).items()}
    folder = beginning.run.checkpoints
    if not recorded and not list_checkpoints(folder):
        return None
    try:
        path, _, rejected = newest_valid(folder, recorded)
    except CheckpointError as error:
        if not beginning.allow_fresh:
            raise
        reason = error.what.replace(f"{folder}", folder.name)  # the ledger may be published; places of a machine stay
        journal.write("warn", what="no valid checkpoint: beginning again, as allowed", reason=reason)
        for path in list_checkpoints(folder):
            quarantine(path)
        return None
    for item in rejected:
        journal.write("warn", what="checkpoint passed over", checkpoint=item.path.name, reason=item.reason)
        quarantine(item.path)
    return path


def _check_ledger_reaches(journal: RunLog, checkpoint: Path) -> None:
    """A checkpoint names the ledger's head at its time; a ledger without that line is an older copy."""
    head = load_state(checkpoint)[0].ledger_head
    if head != journal.head and head not in {record["prev"] for record in journal.records}:
        raise CheckFailed(
            f"the ledger ends before {checkpoint.name} was saved: it is an older copy",
            fix="restore the newer ledger.jsonl, or move the newer checkpoints away and go on from an older one",
        )


def _rewind(journal: RunLog, to_step: int) -> None:
    """Take back the steps after ``to_step``, if there are any."""
    last = max(effective_steps(journal.records), default=0)
    if last > to_step:
        journal.write("rewind", from_step=last, to_step=to_step)
