"""Check every byte of the checkpoints of a run, and that the permanent ones and the best one are there."""

from __future__ import annotations

from pathlib import Path

from resmol.checks import Check, check_problems
from resmol.errors import CheckpointError
from resmol.run.checkpoint_manifest import (
    MANIFEST,
    Checkpoint,
    checkpoint_name,
    list_checkpoints,
    open_checkpoint,
    step_of,
)
from resmol.run.directory import RunDir
from resmol.run.fingerprint import Fingerprint, is_of_step
from resmol.run.ledger import Record, effective_saves, effective_steps
from resmol.system.locks import kept_while_read


def checkpoint_files(run: RunDir, records: list[Record]) -> list[Check]:
    """Check each checkpoint of a run, and that those which have to be kept are there.

    Args:
        run: The run directory.
        records: Its ledger.
    """
    recorded, steps = effective_saves(records), effective_steps(records)
    present = list_checkpoints(run.checkpoints)
    looked_at = [_checkpoint(path, recorded.get(path.name), steps.get(step_of(path), {})) for path in reversed(present)]
    checks = [check for check in looked_at if check is not None]
    names = {path.name for path in present}
    newest = max(recorded.values(), key=lambda record: record["step"], default={})
    kept = {checkpoint_name(step) for step in newest.get("best", {}).values()}
    lost = [name for name, record in recorded.items() if (record["permanent"] or name in kept) and name not in names]
    checks.append(
        check_problems(
            "checkpoints kept", lost, f"{len(present)} present, {len(recorded.keys() - names)} pruned",
            "every permanent checkpoint is there, and the best one",
            "the checkpoint of step 5000 pruned away", str(run.checkpoints),
        )
    )  # fmt: skip
    return checks


def _checkpoint(path: Path, record: Record | None, step: Record) -> Check | None:
    """Check every byte of a checkpoint; None where a run that is being trained has pruned it meanwhile."""
    name, expected = (
        f"checkpoint {path.name}",
        "every byte as in its manifest, the manifest as in the ledger, and the weights as in the record of the step",
    )
    try:
        with kept_while_read(path / MANIFEST):
            checkpoint = open_checkpoint(path)
            checkpoint.verify()
            same = _has_weights_of(checkpoint, step)
            extra = checkpoint.foreign_files()
    except (CheckpointError, FileNotFoundError) as error:
        if not path.exists():
            return None
        what = error.what if isinstance(error, CheckpointError) else f"{path.name}/{MANIFEST} is missing"
        return Check(name, False, what, expected, "a flipped bit, a torn file", str(path))
    manifest = checkpoint.manifest
    if record is not None and manifest.sha256 != record["manifest_sha256"]:
        return Check(name, False, "its manifest is not the one in the ledger", expected, "exchanged weights", str(path))
    if not same:
        what = f"its weights or moments are not those that step {step['step']} recorded ({step['fingerprint']})"
        return Check(name, False, what, expected, "exchanged weights", str(path))
    noted = "" if record is not None else " (committed, not yet in the ledger: a crash came between)"
    foreign = f"; not part of it: {', '.join(extra)}" if extra else ""
    measured = f"{manifest.bytes:,} bytes, manifest {manifest.sha256[:16]}{noted}{foreign}"
    return Check(name, True, measured, expected, "a flipped bit, a torn file", str(path))


def _has_weights_of(checkpoint: Checkpoint, step: Record) -> bool:
    """Return whether a checkpoint has the fingerprint that its step recorded, if there is such a record."""
    if "fingerprint" not in step:
        return True
    files = [file for file, entry in checkpoint.manifest.files.items() if entry.tensors]
    return is_of_step(step["fingerprint"], step["step"], Fingerprint.of_files(checkpoint.path, files))
