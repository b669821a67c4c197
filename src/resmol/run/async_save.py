"""Asynchronous saving: the training thread writes, a background thread makes it durable; one checkpoint at a time.

Training stalls while the files are written into the page cache, read back and hashed, which takes the processor and
needs the tensors. A thread does what waits for the disk while training goes on: the syncs, the commit and, after it,
reading back and removing older checkpoints. No tensor is copied for that. A checkpoint is recorded in the ledger when
all of it is on the disk; a crash before that leaves what a crash during any save leaves: the checkpoint before.

Only the training thread touches the ledger: `AsyncCheckpointer.poll` and `wait_until_finished` record there what the
other thread has done.

Several ranks write a checkpoint together: all of them save after the same steps, and each has such a thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from resmol.config.run_config import RunConfig
from resmol.errors import DiskFull, ProcessLost
from resmol.run.checkpoint import CheckpointTensors, StagedCheckpoint, commit_checkpoint, stage_checkpoint
from resmol.run.checkpoint_manifest import Checkpoint, Manifest, SavedState, checkpoint_name, list_checkpoints, step_of
from resmol.run.held_out import WeightsKind, best_steps
from resmol.run.log_writers import RunLog
from resmol.run.mirror import Mirror
from resmol.run.ranks import ONE_RANK, Ranks
from resmol.run.retention import prune


@dataclass(frozen=True)
class _PendingSave:
    """A checkpoint whose files are written and that is being made durable.

    Attributes:
        manifest: Its manifest.
        seconds: Future of the seconds from the request until it was durable.
        stall_seconds: Seconds for which training waited for its files to be written.
    """

    manifest: Manifest
    seconds: Future[float]
    stall_seconds: float


class AsyncCheckpointer:
    """Decides when to save, writes checkpoints, records them, and prunes older ones.

    At most one save is under way; leaving the context waits for it. Where there are several ranks, each has one.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        run_log: RunLog,
        resumed: Checkpoint | None,
        mirror: Mirror | None = None,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        """Prepare to save.

        Args:
            folder: The ``checkpoints`` directory of the run.
            config: When to save, and what to keep.
            run_log: Records every checkpoint that is durable.
            resumed: The checkpoint that training goes on from, parent of the first one to be saved.
            mirror: Copies each checkpoint that is durable and recorded to a second place.
            ranks: Who writes the checkpoints; rank 0 alone records and prunes them.
        """
        self._mirror, self._ranks, self._committing = mirror, ranks, ranks.for_thread()
        self.folder, self.config, self.run_log = folder, config, run_log
        self._parent = resumed.manifest.sha256 if resumed is not None else None
        self._pending: _PendingSave | None = None
        self._pruning: Future[list[str]] | None = None
        self._disk_full: DiskFull | None = None
        self._thread = ThreadPoolExecutor(1, "checkpointer")

    @property
    def retry_pending(self) -> bool:
        """Whether the last save failed with ENOSPC after its tensors had changed: save again after the next step."""
        return self._disk_full is not None

    def should_save(self, step: int) -> bool:
        """Return whether the state after this step has to be saved."""
        every, permanent, last = self.config.checkpoint.every, self.config.checkpoint.permanent, self.config.train.steps
        due = step == last or (every > 0 and step % every == 0)
        return due or step in permanent or self.retry_pending

    def save(self, state: SavedState, tensors: CheckpointTensors, *, wait: bool = False) -> None:
        """Write a checkpoint, and let it become durable in the background.

        Args:
            state: The content of ``state.json``.
            tensors: Weights and moments; they may change as soon as this returns.
            wait: Return when it is durable and recorded, and the older ones are pruned.

        Raises:
            DiskFull: No room for it, even after older ones were pruned.
            DataError: The run directory was moved or removed.
            CheckpointError: The newest checkpoint is corrupt, so nothing was pruned.
            OSError: The disk failed. All of these may concern the save before, which this one waits for.
            ProcessLost: Another rank died, or did not do its part in time.
        """
        self.wait_until_finished()
        self._start(state, tensors)
        if wait:
            self._finish_save(tensors_unchanged=True)
            if self.retry_pending:
                self._start(state, tensors)
            self.wait_until_finished()

    def poll(self) -> None:
        """Record a save that has finished by now, and start to prune after it; raises what `save` does."""
        if self._pending is not None and self._pending.seconds.done():
            self._finish_save()
        if self._pruning is not None and self._pruning.done():
            self._finish_pruning()
        if self._mirror is not None:
            self._mirror.poll()

    def wait_until_finished(self) -> None:
        """Wait until nothing is under way any more, and record it; raises what `save` does."""
        self._finish_save()
        self._finish_pruning()

    def _start(self, state: SavedState, tensors: CheckpointTensors) -> None:
        started = time.perf_counter()
        self.run_log.sync()  # the checkpoint refers to the ledger's head, which must not be lost if it is kept
        with self._check_run_not_moved():
            staged = self._stage(state, tensors)
        seconds = self._thread.submit(self._commit, staged, started)
        self._pending = _PendingSave(staged.manifest, seconds, time.perf_counter() - started)

    def _stage(self, state: SavedState, tensors: CheckpointTensors) -> StagedCheckpoint:
        try:
            return stage_checkpoint(self.folder, state, tensors, parent=self._parent, ranks=self._ranks)
        except DiskFull:
            self._make_room()
            return stage_checkpoint(self.folder, state, tensors, parent=self._parent, ranks=self._ranks)

    def _make_room(self) -> None:
        if self._ranks.rank:
            return
        removed = prune(self.folder, 1, self._best().values())
        self.run_log.write("warn", what="disk full: older checkpoints pruned", removed=removed)

    def _commit(self, staged: StagedCheckpoint, started: float) -> float:
        commit_checkpoint(staged, self._committing)
        return time.perf_counter() - started

    def _finish_save(self, *, tensors_unchanged: bool = False) -> None:
        """Wait for the save under way and record it.

        Args:
            tensors_unchanged: The caller still has its tensors, so that it can save again where the disk was full.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        started = time.perf_counter()
        try:
            with self._check_run_not_moved():
                seconds = pending.seconds.result()
        except DiskFull as error:
            self._make_room()
            # A later step is no replacement for a permanent one.
            if self.retry_pending or (pending.manifest.permanent and not tensors_unchanged):
                raise
            self._disk_full = error
            return
        self._record(pending.manifest, seconds, pending.stall_seconds + time.perf_counter() - started)
        if self._ranks.rank:
            return
        keep_last = self.config.checkpoint.keep_last
        self._pruning = self._thread.submit(prune, self.folder, keep_last, self._best().values())

    def _best(self) -> dict[WeightsKind, int]:
        """Return the steps of the checkpoints with the lowest held-out losses, which retention keeps."""
        return best_steps(self.run_log.records, [step_of(path) for path in list_checkpoints(self.folder)])

    def _finish_pruning(self) -> None:
        pruning, self._pruning = self._pruning, None
        if pruning is not None:
            pruning.result()

    @contextmanager
    def _check_run_not_moved(self) -> Iterator[None]:
        """Where a file is missing because the whole run was moved, raise the error of the ledger, which states that."""
        try:
            yield
        except FileNotFoundError:
            self.run_log.sync()
            raise

    def _record(self, manifest: Manifest, seconds: float, stall_seconds: float) -> None:
        self._parent, self._disk_full = manifest.sha256, None
        if self._ranks.rank:
            return
        self.run_log.write(
            "save",
            step=manifest.step,
            checkpoint=checkpoint_name(manifest.step),
            manifest_sha256=manifest.sha256,
            bytes=manifest.bytes,
            seconds=round(seconds, 3),
            stall_seconds=round(stall_seconds, 3),
            permanent=manifest.permanent,
            best=self._best(),
        )
        self.run_log.sync()
        if self._mirror is not None:
            self._mirror.request()

    def __enter__(self) -> AsyncCheckpointer:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if isinstance(error, ProcessLost):
            self._committing.abandon()
        try:
            self._finish()
        except Exception as second:
            if error is None:
                raise
            with suppress(Exception):  # the first error is the one to be seen
                self.run_log.write("warn", what="a checkpoint was not written", reason=str(second))
        finally:
            self._thread.shutdown()

    def _finish(self) -> None:
        self.wait_until_finished()
        if self._disk_full is not None:
            raise self._disk_full
