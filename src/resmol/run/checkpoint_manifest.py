"""The directory of a checkpoint: which files it holds, what its manifest says, and whether it is whole.

Nothing in it is believed before it is checked: names, sizes and hashes against the manifest, the manifest against
its own digest and, where the ledger recorded it, against the ledger. The byte layout is in
docs/checkpoint-format.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from resmol.errors import CheckpointError

WEIGHTS, OPTIMIZER, STATE, CONFIG, MANIFEST = (
    "model.safetensors", "optimizer.safetensors", "state.json", "config.json", "manifest.json",
)  # fmt: skip
MAX_JSON_BYTES = 64_000_000
_NAME = re.compile(r"^step-([0-9]{8})$")


class Strict(BaseModel):
    """JSON from a file: no unknown keys, no conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class SavedState(Strict):
    """What the next step depends on, besides weights and moments.

    The order of the data needs no more than ``step``: it is a function of it.
    """

    step: int
    tokens_seen: int
    config_sha256: str
    data_fingerprint: str
    ledger_head: str
    random_state: str
    permanent: bool
    recent_losses: tuple[float, ...] = ()


class FileEntry(Strict):
    """Size and sha256 of a file, and the digest of each tensor in it."""

    bytes: int
    sha256: str
    tensors: dict[str, str]


class Manifest(Strict):
    """The commit record of a checkpoint.

    ``parent`` is the sha256 of the manifest of the checkpoint before, so that checkpoints form a chain as well.
    """

    format: Literal[1]
    step: int
    parent: str | None
    permanent: bool
    files: dict[str, FileEntry]

    def to_bytes(self) -> bytes:
        """Return the content of ``manifest.json``: the fields, and the digest that covers them."""
        return json.dumps({**self.model_dump(), "sha256": self.sha256}, indent=1, sort_keys=True).encode()

    @property
    def sha256(self) -> str:
        """Digest of the fields: what the ledger and the next checkpoint call this one by."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.bytes for entry in self.files.values())


@dataclass(frozen=True)
class SkippedCheckpoint:
    """A checkpoint that was passed over, and why."""

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
    """Return the committed directories, newest first; leftovers and foreign names are not looked at."""
    if not folder.is_dir():
        return []
    found = [
        entry for entry in folder.iterdir() if _NAME.match(entry.name) and entry.is_dir() and not entry.is_symlink()
    ]
    return sorted(found, reverse=True)


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a checkpoint without looking at the files it lists.

    Raises:
        CheckpointError: It is missing, not a manifest, or that of another step.
    """
    content = _read_json(path / MANIFEST)
    try:
        fields = json.loads(content)
        fields.pop("sha256")
        manifest = Manifest.model_validate(fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged(path / MANIFEST, "is not a manifest") from None
    if manifest.to_bytes() != content:
        raise damaged(path / MANIFEST, "is not as it was written: its digest does not cover it")
    if manifest.step != step_of(path):
        raise damaged(path / MANIFEST, f"belongs to step {manifest.step}")
    if set(manifest.files) != {WEIGHTS, OPTIMIZER, STATE, CONFIG}:
        raise damaged(path / MANIFEST, "does not list the files of a checkpoint")
    return manifest


def verify_checkpoint(path: Path) -> Manifest:
    """Check every byte of a checkpoint against its manifest.

    Raises:
        CheckpointError: Something is missing, changed or too much; the message names the file.
    """
    manifest = read_manifest(path)
    present = {entry.name for entry in path.iterdir()}
    if extra := present - {*manifest.files, MANIFEST}:
        raise damaged(path / min(extra), "does not belong there")
    for name, entry in manifest.files.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise damaged(file, "is missing")
        if file.stat().st_size != entry.bytes:
            raise damaged(file, f"has {file.stat().st_size} bytes; the manifest says {entry.bytes}")
    with ThreadPoolExecutor(len(manifest.files)) as pool:  # hashing releases the interpreter
        hashes = list(pool.map(_sha256, [path / name for name in manifest.files]))
    for (name, entry), found in zip(manifest.files.items(), hashes, strict=True):
        if found != entry.sha256:
            raise damaged(path / name, "does not have the sha256 that the manifest says")
    if _read_state(path).step != manifest.step:
        raise damaged(path / STATE, "belongs to another step")
    return manifest


def newest_valid(
    folder: Path, recorded: Mapping[str, str], check: Callable[[Path], Manifest] = verify_checkpoint
) -> tuple[Path, Manifest, list[SkippedCheckpoint]]:
    """Find the newest checkpoint that is whole.

    Args:
        folder: The ``checkpoints`` directory of a run.
        recorded: Name -> sha256 of the manifest, as the ledger has it. A checkpoint that the ledger knows must be
            the very one; one that it does not know was committed just before a crash.
        check: How a checkpoint is checked; `read_manifest` reads none of its other files.

    Raises:
        CheckpointError: There is none; the message lists why each was passed over.
    """
    rejected: list[SkippedCheckpoint] = []
    for path in list_checkpoints(folder):
        try:
            manifest = check(path)
        except CheckpointError as error:
            rejected.append(SkippedCheckpoint(path, error.what))
            continue
        if recorded.get(path.name, manifest.sha256) == manifest.sha256:
            return path, manifest, rejected
        rejected.append(SkippedCheckpoint(path, "its manifest is not the one that the ledger recorded"))
    reasons = "".join(f"\n  - {item.path.name}: {item.reason}" for item in rejected)
    raise CheckpointError(
        f"{folder} holds no valid checkpoint{':' if reasons else ''}{reasons}",
        fix="restore a checkpoint from a copy, or begin again in a new run directory (nothing was deleted here)",
    )


def load_state(path: Path) -> tuple[SavedState, str]:
    """Return ``state.json`` of a verified checkpoint, and the sha256 of its manifest."""
    return _read_state(path), read_manifest(path).sha256


def file_entry(path: Path, digests: dict[str, str]) -> FileEntry:
    """Return size and sha256 of a file as it lies on the disk, together with the digests of its tensors."""
    with path.open("rb") as file:
        return FileEntry(
            bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest(), tensors=digests
        )


def _sha256(file: Path) -> str:
    try:
        return file_entry(file, {}).sha256
    except OSError as error:
        raise damaged(file, f"cannot be read ({error.strerror})") from None


def _read_state(path: Path) -> SavedState:
    try:
        return SavedState.model_validate_json(_read_json(path / STATE))
    except ValidationError as error:
        raise damaged(path / STATE, f"is not a saved state ({error.error_count()} problems)") from None


def _read_json(path: Path) -> bytes:
    try:
        if path.is_symlink() or path.stat().st_size > MAX_JSON_BYTES:
            raise damaged(path, "is a link, or larger than any such file")
        return path.read_bytes()
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from None


def damaged(path: Path, what: str) -> CheckpointError:
    """Return the error that says what is wrong with a file of a checkpoint."""
    return CheckpointError(
        f"{path.parent.name}/{path.name} {what}",
        fix="use another checkpoint of this run; `resmol audit RUN` says which are good",
    )
