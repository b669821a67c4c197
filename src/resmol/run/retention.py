"""Which checkpoints of a run stay: the newest, the permanent ones, and those with the lowest held-out loss."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from resmol.errors import CheckpointError
from resmol.run.checkpoint_manifest import MANIFEST, list_checkpoints, open_checkpoint, read_manifest, step_of
from resmol.system.atomic_io import remove_directory
from resmol.system.locks import unless_being_read


def prune(folder: Path, keep_last: int, keep: Collection[int] = ()) -> list[str]:
    """Remove old checkpoints: the newest ``keep_last``, those of the steps ``keep`` and the permanent ones stay.

    The newest is read back and verified first; if it is corrupt, nothing is removed. One that another process is
    reading stays until the next time.

    Returns:
        The names of the checkpoints that were removed.

    Raises:
        CheckpointError: The newest checkpoint is corrupt.
    """
    paths = list_checkpoints(folder)
    expired = [path for path in paths[keep_last:] if not (step_of(path) in keep or _is_permanent(path))]
    if expired:
        open_checkpoint(paths[0]).verify()
    removed = []
    for path in expired:
        with unless_being_read(path / MANIFEST) as free:
            if free:
                remove_directory(path)
                removed.append(path.name)
    return removed


def _is_permanent(path: Path) -> bool:
    try:
        return read_manifest(path).permanent
    except CheckpointError:
        return True  # corrupt: never deleted, it may be evidence
