"""Saving: the step writes, the background makes it durable; one checkpoint at a time.

Training stands still while the files are written into the page cache, read back and hashed, which takes the processor
and needs the tensors. What waits for the disk is done by a thread while training goes on: the syncs, the commit and,
after it, reading back and removing older checkpoints. No tensor is copied for that. The ledger learns of a checkpoint
when all of it is on the disk; a crash before that leaves what a crash during any save leaves: the checkpoint before.

Only the training thread touches the ledger: `AsyncCheckpointer.settle` picks up there what the other thread has done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from resmol.errors import DiskFull
from resmol.run.checkpoint import CheckpointTensors, StagedCheckpoint, commit_checkpoint, prune, stage_checkpoint
from resmol.run.checkpoint_manifest import Manifest, SavedState, checkpoint_name
from resmol.run.log_writers import RunLog


@dataclass(frozen=True)
class _OnItsWay:
    """A checkpoint whose files are written and that is being made durable.

    Attributes:
        manifest: What it will be.
        seconds: Becomes how long it took from the request until it was durable.
        stood_still: Seconds for which training waited for its files to be written.
    """

    manifest: Manifest
    seconds: Future[float]
    stood_still: float


class AsyncCheckpointer:
    """Writes checkpoints, records them, and prunes older ones; at most one is on its way at any time.

    Leaving the context waits for it. Only the process that holds the run's lock has anything to save.

    Attributes:
        parent: The digest of the last checkpoint that is durable and recorded.
        owed: The disk was full only when a checkpoint was to become durable, so it is lost and its tensors are gone;
            room was made, and the state after the next step must be saved.
    """

    def __init__(self, folder: Path, keep_last: int, journal: RunLog, parent: str | None) -> None:
        """Make ready to save.

        Args:
            folder: The ``checkpoints`` directory of the run.
            keep_last: Retention, besides the permanent ones.
            journal: Learns of every checkpoint that is durable.
            parent: The digest of the checkpoint before.
        """
        self.folder, self.keep_last, self.journal, self.parent = folder, keep_last, journal, parent
        self.owed: DiskFull | None = None
        self._thread = ThreadPoolExecutor(1, "saver")
        self._saving: _OnItsWay | None = None
        self._pruning: Future[list[str]] | None = None

    def save(self, saved: SavedState, contents: CheckpointTensors, *, wait: bool = False) -> None:
        """Write a checkpoint, and let it become durable in the background.

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
        self._start(saved, contents)
        if wait:
            self.settle(wait=True, again=True)
            if self.owed is not None:
                self._start(saved, contents)
                self.settle(wait=True)

    def settle(self, *, wait: bool, again: bool = False) -> None:
        """Record what has become durable (raises what `save` does).

        Args:
            wait: Wait for all that is on its way.
            again: A save that found the disk full can be tried again, since its tensors are still what they were.
        """
        if self._saving is not None and (wait or self._saving.seconds.done()):
            started, saving, self._saving = time.perf_counter(), self._saving, None
            try:
                with self._knows_when_the_run_was_moved():
                    seconds = saving.seconds.result()
            except DiskFull as error:
                self._make_room()
                # A later step is no replacement for a permanent one.
                if self.owed is not None or (saving.manifest.permanent and not again):
                    raise
                self.owed = error
                return
            self._record(saving.manifest, seconds, saving.stood_still + time.perf_counter() - started)
            self._pruning = self._thread.submit(prune, self.folder, self.keep_last)
        if self._pruning is not None and (wait or self._pruning.done()):
            pruning, self._pruning = self._pruning, None
            pruning.result()

    def _start(self, saved: SavedState, contents: CheckpointTensors) -> None:
        started = time.perf_counter()
        self.journal.sync()  # the checkpoint refers to the ledger's head, which must not be lost if it is kept
        with self._knows_when_the_run_was_moved():
            staged = self._stage(saved, contents)
        seconds = self._thread.submit(self._commit, staged, started)
        self._saving = _OnItsWay(staged.manifest, seconds, time.perf_counter() - started)

    def _stage(self, saved: SavedState, contents: CheckpointTensors) -> StagedCheckpoint:
        try:
            return stage_checkpoint(self.folder, saved, contents, parent=self.parent)
        except DiskFull:
            self._make_room()
            return stage_checkpoint(self.folder, saved, contents, parent=self.parent)

    def _make_room(self) -> None:
        removed = prune(self.folder, keep_last=1)
        self.journal.write("warn", what="disk full: older checkpoints pruned", removed=removed)

    def _commit(self, staged: StagedCheckpoint, started: float) -> float:
        commit_checkpoint(staged)
        return time.perf_counter() - started

    @contextmanager
    def _knows_when_the_run_was_moved(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            self.journal.sync()  # says it better, if the whole run was moved away meanwhile
            raise

    def _record(self, manifest: Manifest, seconds: float, stood_still: float) -> None:
        self.parent, self.owed = manifest.sha256, None
        self.journal.write(
            "save",
            step=manifest.step,
            checkpoint=checkpoint_name(manifest.step),
            manifest_sha256=manifest.sha256,
            bytes=manifest.bytes,
            seconds=round(seconds, 3),
            stalled_seconds=round(stood_still, 3),
            permanent=manifest.permanent,
        )
        self.journal.sync()

    def __enter__(self) -> AsyncCheckpointer:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        try:
            self._finish()
        except Exception as second:
            if error is None:
                raise
            with suppress(Exception):  # the first error is the one to be seen
                self.journal.write("warn", what="a checkpoint was not written", reason=str(second))
        finally:
            self._thread.shutdown()

    def _finish(self) -> None:
        self.settle(wait=True)
        if self.owed is not None:
            raise self.owed
