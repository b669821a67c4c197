"""A name of a model together with what a run offers to choose: `--weights` and `--best`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from resmol.errors import DataError, UsageError
from resmol.interop.hf_folder import WeightFiles, find_weights
from resmol.run.checkpoint_manifest import (
    AVERAGED,
    Checkpoint,
    SkippedCheckpoint,
    checkpoint_name,
    list_checkpoints,
    newest_valid,
    step_of,
)
from resmol.run.directory import RunDir
from resmol.run.held_out import WeightsKind, best_steps
from resmol.run.ledger import Record, effective_saves, read_ledger
from resmol.system.safetensors_header import read_header

AVERAGING = "`resmol train RUN --set averaging.fraction=0.2`"


@dataclass(frozen=True)
class ModelRef:
    """MODEL, and which of a run's weights are meant.

    Attributes:
        source: A path, a Hub id, ``pypi``, or the name of a preset.
        weights: Those of the last step, or their average, which a run with ``averaging.fraction`` keeps.
        best: Of a run, the checkpoint with the lowest held-out loss instead of the newest.
    """

    source: str | Path
    weights: WeightsKind = "last"
    best: bool = False

    @classmethod
    def of(cls, source: str | Path | ModelRef) -> ModelRef:
        """Return the reference itself, or that to the newest weights of a name."""
        return source if isinstance(source, ModelRef) else cls(source)

    def __str__(self) -> str:
        return str(self.source)

    def require_no_choice(self) -> None:
        """Refuse a choice (`UsageError`) where there is none: the source is no run and no checkpoint."""
        self.require_not_best()
        if self.weights == "averaged":
            raise UsageError(
                f"{self} has one set of weights; averaged ones are in the checkpoints of a run with averaging.fraction",
                fix="leave --weights out, or name such a run",
            )

    def require_not_best(self) -> None:
        """Refuse ``best`` (`UsageError`): the source is not a run."""
        if self.best:
            raise UsageError(
                f"{self} is no run, and --best chooses among the checkpoints of one",
                fix="leave --best out, or name the run directory",
            )


def checkpoint_of_run(
    run: RunDir, ref: ModelRef, *, verify: bool, hold: ExitStack
) -> tuple[Checkpoint, list[SkippedCheckpoint], tuple[str, ...]]:
    """Find the checkpoint of a run that is meant; the run has some.

    Returns:
        The checkpoint, the newer ones that were skipped, and sentences about the choice.

    Raises:
        CheckpointError: None is whole, or the best one is damaged.
        DataError: ``best`` is asked for, and no checkpoint was evaluated.
    """
    records = read_ledger(run.ledger).records if run.ledger.exists() else []
    recorded = {name: record["manifest_sha256"] for name, record in effective_saves(records).items()}
    only: str | None = None
    notes: tuple[str, ...] = ()
    if ref.best:
        step = _best(run, records, ref.weights)
        only, notes = checkpoint_name(step), ("its held-out loss is the lowest of the checkpoints that are kept",)
    found, skipped = newest_valid(run.checkpoints, recorded, verify=verify, hold=hold, only=only)
    return found, skipped, notes


def _best(run: RunDir, records: list[Record], weights: WeightsKind) -> int:
    """Return the step of the checkpoint with the lowest held-out loss."""
    present = [step_of(path) for path in list_checkpoints(run.checkpoints)]
    best = best_steps(records, present)
    if weights not in best:
        raise DataError(
            f"{run.path} has no checkpoint after whose step a held-out loss of the {weights} weights was measured",
            fix="leave --best out; a run measures it where text is held out and evaluation.every is above 0"
            + (f"; and a new run averages: {AVERAGING}" if weights == "averaged" else ""),
        )
    return best[weights]


def weights_of_checkpoint(checkpoint: Checkpoint, ref: ModelRef) -> WeightFiles:
    """Return the weight file of a checkpoint that is meant (`DataError` where it keeps no average)."""
    if ref.weights == "last":
        return find_weights(checkpoint.path)
    if AVERAGED not in checkpoint.manifest.files:
        raise DataError(
            f"{checkpoint.path} keeps no averaged weights: its run was started without averaging.fraction",
            fix=f"leave --weights out; a new run averages: {AVERAGING}",
        )
    path = checkpoint.path / AVERAGED
    return WeightFiles((path,), read_header(path).tensors)
