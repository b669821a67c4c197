"""Saving while training goes on: a copy of the state is taken, and committed by a thread; one at a time.

Training stands still for the copy alone. The ledger learns of a checkpoint, and older ones are pruned, only when all
of it is on the disk; a crash before that leaves what a crash during any save leaves: the checkpoint before. What this
costs in memory is the copy: weights and moments once more, the same memory for every save.

Only the training thread touches the ledger: `Saver.settle` picks up there what the other thread has done.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from resmol.checkpoint import Contents, prune, save_checkpoint
from resmol.errors import DiskFull
from resmol.manifest import Manifest, SavedState, checkpoint_name
from resmol.views import Journal


@dataclass(frozen=True)
class _Committed:
    """A checkpoint that is on the disk, and how long that took from the request, in seconds."""

    manifest: Manifest
    seconds: float


class Saver:
    """Commits checkpoints, records them, and prunes older ones; at most one is on its way at any time.

    Leaving the context waits for it. Only the process that holds the run's lock has anything to save.
    """

    def __init__(self, folder: Path, keep_last: int, journal: Journal, parent: str | None, *, background: bool) -> None:
        """Make ready to save.

        Args:
            folder: The ``checkpoints`` directory of the run.
            keep_last: Retention, besides the permanent ones.
            journal: Learns of every checkpoint that is durable.
            parent: The digest of the checkpoint before.
            background: Let training go on during a save.
        """
        self.folder, self.keep_last, self.journal, self.background = folder, keep_last, journal, background
        self.parent = parent
        self._thread = ThreadPoolExecutor(1, "saver")
        self._copy: Contents | None = None
        self._saving: Future[_Committed] | None = None
        self._pruning: Future[list[str]] | None = None
        self._stood_still = 0.0  # seconds of the save on its way
        self._made_room: list[str] | None = None  # older checkpoints that were pruned for it, when the disk was full

    def save(self, saved: SavedState, contents: Contents, *, wait: bool = False) -> None:
        """Commit a checkpoint: in the background, from a copy, or now.

        Args:
            saved: What goes into ``state.json``.
            contents: The tensors; they may change as soon as this returns.
            wait: Return when it is durable and recorded, and the older ones are pruned.

        Raises:
            DiskFull: No room for it, even after older ones were pruned.
            DataError: The run directory was moved or removed.
            CheckpointError: The newest checkpoint is damaged, so nothing was pruned.
            OSError: The disk failed. All of these may concern the save before, which this one waits for.
        """
        self.settle(wait=True)
        started = time.perf_counter()
        self.journal.sync()  # the checkpoint refers to the ledger's head, which must not be lost if it is kept
        wait = wait or not self.background
        if not wait:
            contents = self._copy = contents.copied(into=self._copy)
        self._saving = self._thread.submit(self._commit, saved, contents, started)
        self._stood_still = time.perf_counter() - started
        if wait:
            self.settle(wait=True)

    def settle(self, *, wait: bool) -> None:
        """Record what has become durable; with ``wait``, after all that is on its way (raises what `save` does)."""
        if self._saving is not None and (wait or self._saving.done()):
            started, saving, self._saving = time.perf_counter(), self._saving, None
            try:
                committed = saving.result()
            except FileNotFoundError:
                self.journal.sync()  # says it better, if the whole run was moved away meanwhile
                raise
            finally:
                if self._made_room is not None:
                    removed, self._made_room = self._made_room, None
                    self.journal.write("warn", what="disk full: older checkpoints pruned", removed=removed)
            self._record(committed, self._stood_still + time.perf_counter() - started)
            self._pruning = self._thread.submit(prune, self.folder, self.keep_last)
        if self._pruning is not None and (wait or self._pruning.done()):
            pruning, self._pruning = self._pruning, None
            pruning.result()

    def _commit(self, saved: SavedState, contents: Contents, started: float) -> _Committed:
        try:
            manifest = save_checkpoint(self.folder, saved, contents, parent=self.parent)
        except DiskFull:
            self._made_room = prune(self.folder, keep_last=1)
            manifest = save_checkpoint(self.folder, saved, contents, parent=self.parent)
        return _Committed(manifest, time.perf_counter() - started)

    def _record(self, committed: _Committed, stood_still: float) -> None:
        manifest = committed.manifest
        self.parent = manifest.sha256
        self.journal.write(
            "save",
            step=manifest.step,
            checkpoint=checkpoint_name(manifest.step),
            manifest_sha256=manifest.sha256,
            bytes=manifest.bytes,
            seconds=round(committed.seconds, 3),
            stalled_seconds=round(stood_still, 3),
            permanent=manifest.permanent,
        )
        self.journal.sync()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            self.settle(wait=True)
        except Exception as second:
            if error is None:
                raise
            with suppress(Exception):  # the first error is the one to be seen
                self.journal.write("warn", what="a checkpoint was not written", reason=str(second))
        finally:
            self._thread.shutdown()
