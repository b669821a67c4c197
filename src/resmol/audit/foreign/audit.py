"""`resmol audit --foreign DIR`: what can be said of a run of transformers' Trainer from JSON and safetensors files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resmol.audit.foreign.log_history import (
    checkpoints,
    data_position,
    finite_numbers,
    losses_at_checkpoints,
    not_read,
    one_history,
    plan,
    steps_logged,
)
from resmol.audit.foreign.lr_schedules import learning_rate, parse_arguments
from resmol.audit.foreign.trainer_files import read_trainer_files
from resmol.audit.foreign.weight_changes import weight_changes
from resmol.checks import Checks


def audit_foreign(folder: str | Path, trainer_arguments: Sequence[str] = ()) -> Checks:
    """Check the folder that transformers' Trainer wrote, as `resmol audit --foreign` does.

    Its history is no chain: whoever edits every state alike is not found. Nothing is unpickled or executed.

    Args:
        folder: The ``output_dir`` of a Trainer, or one checkpoint.
        trainer_arguments: What is known of its training arguments, as ``NAME=VALUE``, such as
            ``lr_scheduler_type=cosine``; the rest is inferred from the history.

    Raises:
        UsageError: An argument has no such form.
        DataError: There is no state of a Trainer.
    """
    given = parse_arguments(trainer_arguments)
    run = read_trainer_files(folder)
    return Checks(
        [
            checkpoints(run),
            one_history(run),
            steps_logged(run),
            plan(run),
            learning_rate(run, given),
            data_position(run),
            finite_numbers(run),
            losses_at_checkpoints(run),
            weight_changes(run.checkpoints),
            not_read(run),
        ]
    )
