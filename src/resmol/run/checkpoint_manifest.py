"""The directory of a checkpoint: which files it holds, what its manifest states, and whether it is whole.

Nothing in it is believed before it is checked: names, sizes and hashes against the manifest, the manifest against
its own digest and, where the ledger recorded it, against the ledger. The byte layout is in
docs/checkpoint-format.md.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from resmol.config.strict_model import StrictModel
from resmol.errors import CheckpointError
from resmol.run.mixture_place import MixturePlace
from resmol.system.atomic_io import file_sha256
from resmol.system.locks import kept_while_read
from resmol.system.untrusted_text import listed
from resmol.system.wording import counted

logger = logging.getLogger(__name__)

FORMAT: Literal[2] = 2  # of version 0.2; version 0.1 wrote 1
WEIGHTS, OPTIMIZER, STATE, CONFIG, MANIFEST = (
    "model.safetensors", "optimizer.safetensors", "state.json", "config.json", "manifest.json",
)  # fmt: skip
AVERAGED = "averaged.safetensors"  # only where the run averages its weights
MAX_JSON_BYTES = 64_000_000
MAX_LOOKS = 1000  # at a folder whose checkpoints go while they are looked at; each look is a newer one
SHOWN_FILES = 3  # of those that do not belong to a checkpoint
_NAME = re.compile(r"^step-([0-9]{8})$")


class LossScale(StrictModel):
    """The loss scale of float16 after a step; train/loss_scale.py has the rule by which it changes.

    Attributes:
        scale: What the mean loss of a micro-batch is multiplied by.
        good_steps: Steps without an overflow since it last changed.
        skipped_steps: Steps of the run whose gradient overflowed: they changed no weight and no moment.
    """

    scale: float = Field(2.0**16, gt=0)  # torch.amp.GradScaler's first
    good_steps: int = Field(0, ge=0)
    skipped_steps: int = Field(0, ge=0)

    def updates(self, step: int) -> int:
        """Return how many of the steps up to ``step`` updated the weights."""
        return step - self.skipped_steps


class SavedState(StrictModel):
    """What the next step depends on, besides weights and moments.

    ``windows_seen`` is the place in the data: the order of the windows is a function of the seed. ``mixture`` tells how
    many windows of each source they were. ``config_sha256`` and ``data_fingerprint`` bind the checkpoint to a
    configuration and to data; a resume compares them. ``loss_scale`` is there where the run has computed in float16.
    ``fingerprint`` is that of all tensors as they were in memory (`run/fingerprint.py`).
    """

    step: int
    tokens_seen: int
    windows_seen: int
    config_sha256: str
    data_fingerprint: str
    ledger_head: str
    random_state: str
    permanent: bool
    recent_losses: tuple[float, ...] = ()
    mixture: MixturePlace | None = None
    loss_scale: LossScale = LossScale()
    fingerprint: str | None = None

    def to_bytes(self) -> bytes:
        """Return the content of ``state.json``, without what the run does not have: a mixture, a loss scale."""
        untouched = {"loss_scale"} if self.loss_scale == LossScale() else None
        return self.model_dump_json(indent=1, exclude=untouched, exclude_none=True).encode()


class FileEntry(StrictModel):
    """Size and sha256 of a file, and the digest of each tensor in it."""

    bytes: int
    sha256: str
    tensors: dict[str, str]


class Manifest(StrictModel):
    """The commit record of a checkpoint.

    ``parent`` is the sha256 of the manifest of the checkpoint before, so that checkpoints form a chain as well.
    """

    format: Literal[2] = FORMAT
    step: int
    parent: str | None
    permanent: bool
    files: dict[str, FileEntry]

    def to_bytes(self) -> bytes:
        """Return the content of ``manifest.json``: the fields, and the digest that covers them."""
        return json.dumps({**self.model_dump(), "sha256": self.sha256}, indent=1, sort_keys=True).encode()

    @cached_property
    def sha256(self) -> str:
        """Digest of the fields, by which the ledger and the next checkpoint refer to this one."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.bytes for entry in self.files.values())


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest and state were read; `open_checkpoint` makes one.

    Its tensors are read by `resmol.run.checkpoint.load_into`.
    """

    path: Path
    manifest: Manifest
    state: SavedState

    def verify(self) -> None:
        """Check every byte against the manifest.

        Raises:
            CheckpointError: A file is missing or changed; the message names it.
        """
        entries = self.manifest.files
        for name, entry in entries.items():
            file = self.path / name
            if file.is_symlink() or not file.is_file():
                raise corrupt(file, "is missing")
            if file.stat().st_size != entry.bytes:
                raise corrupt(file, f"has {counted(file.stat().st_size, 'byte')}; the manifest states {entry.bytes:,}")
        with ThreadPoolExecutor(len(entries)) as pool:  # hashing releases the interpreter
            hashes = list(pool.map(_sha256, [self.path / name for name in entries]))
        for (name, entry), found in zip(entries.items(), hashes, strict=True):
            if found != entry.sha256:
                raise corrupt(self.path / name, "does not have the sha256 of the manifest")

    def foreign_files(self) -> list[str]:
        """Return what the manifest does not list and nothing reads, such as the .DS_Store of a file manager."""
        return sorted({entry.name for entry in self.path.iterdir()} - {*self.manifest.files, MANIFEST})

    def warn_of_foreign_files(self) -> None:
        """Log a warning where there are such files; the checkpoint is as good without them."""
        if found := self.foreign_files():
            logger.warning(
                f"{self.path.name} also holds {listed(found, SHOWN_FILES)}, which the manifest does not list: ignored"
            )


@dataclass(frozen=True)
class SkippedCheckpoint:
    """A checkpoint that was skipped, and why."""

    path: Path
    reason: str


def checkpoint_name(step: int) -> str:
    """Return ``step-00005000``."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name (`CheckpointError` when it is no such name)."""
    match = _NAME.match(path.name)
    if match is None:
        raise CheckpointError(f"{path.name!r} is not the name of a checkpoint", fix="name a directory step-00005000")
    return int(match[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the committed directories, newest first; leftovers and foreign names are ignored."""
    if not folder.is_dir():
        return []
    found = [
        entry for entry in folder.iterdir() if _NAME.match(entry.name) and entry.is_dir() and not entry.is_symlink()
    ]
    return sorted(found, reverse=True)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the manifest and the state of a checkpoint; `Checkpoint.verify` then checks the rest.

    Raises:
        CheckpointError: One of them is missing, not valid, or that of another step or format.
    """
    manifest = read_manifest(path)
    content = _read_json(path / STATE)
    if hashlib.sha256(content).hexdigest() != manifest.files[STATE].sha256:
        raise corrupt(path / STATE, "does not have the sha256 of the manifest")
    try:
        state = SavedState.model_validate_json(content)
    except ValidationError as error:
        raise corrupt(path / STATE, f"is not a saved state ({error.error_count()} problems)") from None
    if state.step != manifest.step:
        raise corrupt(path / STATE, "belongs to another step")
    return Checkpoint(path, manifest, state)


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a checkpoint alone.

    Raises:
        CheckpointError: It is missing, not a manifest, or that of another step or format.
    """
    return parse_manifest(_read_json(path / MANIFEST), path)


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """Return the manifest that a file of the checkpoint ``path`` holds; raises what `read_manifest` does."""
    try:
        fields = json.loads(content)
        fields.pop("sha256")
        written_as = fields["format"]
        manifest = Manifest.model_validate(fields) if written_as == FORMAT else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise corrupt(path / MANIFEST, "is not a manifest") from None
    if manifest is None:
        raise CheckpointError(
            f"{path.name}/{MANIFEST} has format {str(written_as)[:20]}; this version of resmol reads {FORMAT}",
            fix="use the version that wrote it (format 1: 0.1); a model that it exports can be read by every version",
        )
    if manifest.to_bytes() != content:
        raise corrupt(path / MANIFEST, "is not as it was written: its digest does not cover it")
    if manifest.step != step_of(path):
        raise corrupt(path / MANIFEST, f"belongs to step {manifest.step}")
    if set(manifest.files) - {AVERAGED} != {WEIGHTS, OPTIMIZER, STATE, CONFIG}:
        raise corrupt(path / MANIFEST, "does not list the files of a checkpoint")
    return manifest


def newest_valid(
    folder: Path,
    recorded: Mapping[str, str],
    *,
    verify: bool = True,
    hold: ExitStack | None = None,
    only: str | None = None,
) -> tuple[Checkpoint, list[SkippedCheckpoint]]:
    """Find the newest checkpoint that is whole.

    Others may write while this reads: a checkpoint that was listed and is gone is no corrupt one, but a reason to look
    again.

    Args:
        folder: The ``checkpoints`` directory of a run.
        recorded: Name -> sha256 of the manifest, as the ledger has it. A checkpoint that the ledger knows must be
            the very one; one that it does not know was committed just before a crash.
        verify: Check every byte; else the manifest and the state alone are read.
        only: The name of the one checkpoint to look at; None looks at all.
        hold: Keeps retention away from the checkpoint that is returned, until it is closed. Needed by readers that do
            not hold the run's lock.

    Returns:
        The checkpoint, and the newer ones that were skipped.

    Raises:
        CheckpointError: There is none; the message lists why each was skipped.
    """
    for _ in range(MAX_LOOKS):
        paths = [path for path in list_checkpoints(folder) if only in (None, path.name)]
        found, skipped = _newest_of(paths, recorded, verify=verify, hold=hold)
        if found is not None:
            found.warn_of_foreign_files()
            return found, skipped
        if all(item.path.exists() for item in skipped):
            break
    reasons = "".join(f"\n  - {item.path.name}: {item.reason}" for item in skipped)
    raise CheckpointError(
        f"{folder} holds no valid checkpoint{':' if reasons else ''}{reasons}",
        fix="restore a checkpoint from a copy, or begin again in a new run directory (nothing was deleted here)",
    )


def _newest_of(
    paths: Sequence[Path], recorded: Mapping[str, str], *, verify: bool, hold: ExitStack | None
) -> tuple[Checkpoint | None, list[SkippedCheckpoint]]:
    """Return the first of these that is whole, and those before it that are not; None where one went meanwhile."""
    skipped: list[SkippedCheckpoint] = []
    for path in paths:
        with ExitStack() as held:
            try:
                if hold is not None:
                    held.enter_context(kept_while_read(path / MANIFEST))
                checkpoint = open_checkpoint(path)
                if verify:
                    checkpoint.verify()
                if recorded.get(path.name, checkpoint.manifest.sha256) != checkpoint.manifest.sha256:
                    raise corrupt(path / MANIFEST, "is not the one that the ledger recorded")
            except (CheckpointError, OSError) as error:
                reason = error.what if isinstance(error, CheckpointError) else f"cannot be read ({error.strerror})"
                skipped.append(SkippedCheckpoint(path, reason))
                if not path.exists():
                    return None, skipped
                continue
            if hold is not None:
                hold.push(held.pop_all())
            return checkpoint, skipped
    return None, skipped


def file_entry(path: Path, digests: dict[str, str]) -> FileEntry:
    """Return size and sha256 of a file as it lies on the disk, together with the digests of its tensors."""
    return FileEntry(bytes=path.stat().st_size, sha256=file_sha256(path), tensors=digests)


def _sha256(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        raise corrupt(file, f"cannot be read ({error.strerror})") from None


def _read_json(path: Path) -> bytes:
    try:
        if path.is_symlink() or path.stat().st_size > MAX_JSON_BYTES:
            raise corrupt(path, "is a link, or larger than any such file")
        return path.read_bytes()
    except OSError as error:
        raise corrupt(path, f"cannot be read ({error.strerror})") from None


def corrupt(path: Path, what: str) -> CheckpointError:
    """Return the error for a file of a checkpoint that is not what it has to be."""
    return CheckpointError(
        f"{path.parent.name}/{path.name} {what}",
        fix="use another checkpoint of this run; `resmol audit RUN` lists the good ones",
    )
