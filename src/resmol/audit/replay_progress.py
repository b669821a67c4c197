"""What a complete replay has done so far, so that the same command goes on after an interruption.

It lies in a folder of the auditor's, not in the run: whoever hands over a run could have written it. It is bound to the
head of the ledger and to the version of resmol; with another one the replay begins again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from resmol.audit.segment import Outcome, Recorded, Segment
from resmol.errors import CheckpointError
from resmol.run.checkpoint import commit_checkpoint, stage_checkpoint
from resmol.run.checkpoint_manifest import SavedState, checkpoint_name, list_checkpoints, newest_valid, read_manifest
from resmol.system.atomic_io import make_directory, remove_directory, write_durable
from resmol.system.locks import exclusive_lock
from resmol.train.step import TrainState
from resmol.version import __version__

SAVE_SECONDS = 30.0  # of work that an interruption may cost, at least
SAVE_COST = 0.05  # share of the time that saving may take
NOTES, LOCK = "notes.json", "lock"


@dataclass
class ReplayProgress:
    """The folder of one complete replay.

    Attributes:
        folder: Where it lies.
        head: The head of the ledger that is replayed.
        done: What passed: a name that binds it to what was looked at -> words.
    """

    folder: Path
    head: str
    done: dict[str, str] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def open(cls, folder: Path, head: str) -> Iterator[ReplayProgress]:
        """Read what is there and hold the folder meanwhile; what belongs to another ledger or version is removed.

        Raises:
            RunInUse: Another process replays with this folder.
        """
        with exclusive_lock(folder / LOCK):
            progress = cls(folder, head)
            if not progress._read():
                progress.done = {}
                progress._remove_states()
                progress._write()
            yield progress

    def _read(self) -> bool:
        """Read the notes; return whether they belong to this ledger and version."""
        try:
            found: dict[str, Any] = json.loads((self.folder / NOTES).read_bytes())
            self.done = dict(found["done"])
            return bool((found["head"], found["resmol"]) == (self.head, __version__))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _write(self) -> None:
        content = {"head": self.head, "resmol": __version__, "done": self.done}
        write_durable(self.folder / NOTES, json.dumps(content, indent=1).encode())

    def once(self, name: str, judge: Callable[[], Outcome]) -> Outcome:
        """Return what ``judge`` finds; what it found to pass in an earlier call is not judged again."""
        if name in self.done:
            return Outcome("PASS", f"{self.done[name]} (in an earlier call)")
        outcome = judge()
        self.note(name, outcome)
        return outcome

    def note(self, name: str, outcome: Outcome) -> None:
        """Keep that something passed, if it did."""
        if outcome.verdict == "PASS":
            self.done[name] = outcome.words
            self._write()

    def finish(self) -> None:
        """Forget everything: all of it passed, and the next replay is one of its own."""
        self._remove_states()
        (self.folder / NOTES).unlink(missing_ok=True)

    def states_of(self, segment: Segment) -> Path:
        """Return where the states within a segment are kept."""
        return self.folder / f"from-{checkpoint_name(segment.start)}"

    def _remove_states(self) -> None:
        for folder in self.folder.glob("from-step-*"):
            remove_directory(folder)


def segment_name(source: Recorded, segment: Segment) -> str:
    """Return the name under which a segment is noted: its steps, and the checkpoints between which they lie."""
    hashes = []
    for step in (segment.start, segment.end):
        path = source.checkpoint(step)
        hashes.append(read_manifest(path).sha256 if path.is_dir() else "none")
    return f"{segment} from {hashes[0]} to {hashes[1]}"


class StateKeeper:
    """Saves the state within a segment now and then, the newest only.

    Args:
        folder: Where.
        now: The clock, in seconds.
    """

    def __init__(self, folder: Path, now: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._now = folder, now
        self._next = now() + SAVE_SECONDS

    def newest(self) -> Path | None:
        """Return the newest state that is whole; None without one."""
        try:
            return newest_valid(self._folder, {})[0].path
        except CheckpointError:
            return None

    def after_step(self, state: TrainState) -> None:
        """Save the state if it is time to."""
        started = self._now()
        if started < self._next:
            return
        saved = SavedState(
            step=state.step, tokens_seen=state.tokens_seen, windows_seen=state.windows_seen, mixture=state.mixture,
            loss_scale=state.loss_scale, recent_losses=state.recent_losses, config_sha256="", data_fingerprint="",
            ledger_head="", random_state=torch.get_rng_state().numpy().tobytes().hex(), permanent=False,
        )  # fmt: skip
        make_directory(self._folder)
        commit_checkpoint(stage_checkpoint(self._folder, saved, state.tensors(), parent=None))
        for older in list_checkpoints(self._folder)[1:]:
            remove_directory(older)
        ended = self._now()
        self._next = ended + max(SAVE_SECONDS, (ended - started) / SAVE_COST)
