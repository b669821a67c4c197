"""Where a mirror can be: a folder, such as a mounted drive, or a private repository on the Hugging Face Hub."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from resmol.errors import DataError, NetworkError, UsageError
from resmol.run.checkpoint_manifest import MANIFEST, Manifest, corrupt, parse_manifest, read_manifest
from resmol.system.atomic_io import commit_directory, file_sha256, remove_directory, remove_leftovers, write_durable
from resmol.system.hub_download import is_hub_id
from resmol.system.user_paths import user_path

CHECKPOINTS = "checkpoints"
HUB = "hf://"


@runtime_checkable
class MirrorPlace(Protocol):
    """A place that holds a run's files by their names in the run directory."""

    def open(self) -> None:
        """Look at the place as it is now (`DataError`: it cannot be reached)."""

    def read(self, name: str) -> bytes | None:
        """Return a small file; None where it is not there."""

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints there."""

    def fetch(self, checkpoint: str, manifest: Manifest, folder: Path) -> None:
        """Copy the files of a checkpoint that its manifest lists into a folder."""

    def write(self, checkpoints: Sequence[Path], files: Mapping[str, bytes], expired: Sequence[str]) -> None:
        """Add checkpoints, then replace small files in order, then remove checkpoints that are no longer kept."""


def mirror_place(where: str) -> MirrorPlace:
    """Return the place that ``--mirror`` names (`UsageError` when it names none)."""
    if not where.startswith(HUB):
        return FolderPlace(user_path(where))
    hub_id = where.removeprefix(HUB).strip("/")
    if not is_hub_id(hub_id):
        raise UsageError(f"--mirror is {where!r}", fix="give a folder, or hf://OWNER/NAME")
    return HubPlace(hub_id)


def verified_copy(folder: Path, manifest: Manifest) -> None:
    """Compare the files in a folder with the manifest that they were copied by (`CheckpointError`)."""
    for name, entry in manifest.files.items():
        if file_sha256(folder / name) != entry.sha256:
            raise corrupt(folder / name, "changed while it was copied")


class FolderPlace:
    """A folder, laid out as a run directory is. The folder that it lies in must exist: a drive must be mounted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checkpoints = path / CHECKPOINTS

    def open(self) -> None:
        """Check that the drive is there."""
        if not self.path.parent.is_dir():
            raise DataError(
                f"the mirror {self.path} cannot be reached: {self.path.parent} is not there",
                fix="mount the drive that it lies on, or make that folder",
            )

    def read(self, name: str) -> bytes | None:
        """Return a small file; None where it is not there."""
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints there."""
        try:
            return sorted(name for name in os.listdir(self._checkpoints) if name.startswith("step-"))  # noqa: PTH208
        except (FileNotFoundError, NotADirectoryError):
            return []

    def fetch(self, checkpoint: str, manifest: Manifest, folder: Path) -> None:
        """Copy the files of a checkpoint that its manifest lists into a folder."""
        copy_files(self._checkpoints / checkpoint, manifest, folder)

    def write(self, checkpoints: Sequence[Path], files: Mapping[str, bytes], expired: Sequence[str]) -> None:
        """Commit each checkpoint as a run does, replace each file atomically, and remove what is expired last."""
        self.open()
        for folder in (self.path, self._checkpoints):
            folder.mkdir(exist_ok=True)
            remove_leftovers(folder)
        for source in checkpoints:
            final = self._checkpoints / source.name
            if final.exists():  # damaged, or of a step that was taken back and executed again
                remove_directory(final)
            copy_checkpoint(source, final)
        for name, content in files.items():
            write_durable(self.path / name, content)
        for name in expired:
            remove_directory(self._checkpoints / name)


def copy_files(source: Path, manifest: Manifest, folder: Path) -> None:
    """Copy the files that a checkpoint's manifest lists into a folder."""
    for name in manifest.files:
        shutil.copyfile(source / name, folder / name)


def copy_checkpoint(source: Path, final: Path) -> None:
    """Copy a checkpoint by the commit protocol, compared with its manifest before it has its name."""
    content = (source / MANIFEST).read_bytes()
    manifest = parse_manifest(content, source)

    def write_files(temporary: Path) -> None:
        copy_files(source, manifest, temporary)
        verified_copy(temporary, manifest)

    commit_directory(final, write_files, lambda _: content)


class HubPlace:
    """A private model repository on the Hub; everything that a save changes is one commit there.

    A commit names the one before it, so of two machines that write at the same time the Hub refuses one.
    """

    def __init__(self, hub_id: str) -> None:
        self.hub_id = hub_id
        self._commit: str | None = None
        self._names: list[str] = []

    def open(self) -> None:
        """Create the repository if need be, and look at its newest commit."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._explained("reached") as api:
            try:
                info: Any = api.repo_info(self.hub_id)
            except RepositoryNotFoundError:
                api.create_repo(self.hub_id, private=True)
                info = api.repo_info(self.hub_id)
        self._commit, self._names = info.sha, [file.rfilename for file in info.siblings or ()]

    def read(self, name: str) -> bytes | None:
        """Return a small file of the commit that was looked at; None where it has none."""
        if name not in self._names:
            return None
        with tempfile.TemporaryDirectory(prefix="resmol-mirror-") as scratch:
            return self._download(name, Path(scratch)).read_bytes()

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints there."""
        return sorted({name.split("/")[1] for name in self._names if name.startswith(f"{CHECKPOINTS}/step-")})

    def fetch(self, checkpoint: str, manifest: Manifest, folder: Path) -> None:
        """Download the files of a checkpoint that its manifest lists into a folder."""
        with tempfile.TemporaryDirectory(prefix="tmp-mirror-", dir=folder.parent) as scratch:
            for name in manifest.files:
                shutil.move(self._download(f"{CHECKPOINTS}/{checkpoint}/{name}", Path(scratch)), folder / name)

    def write(self, checkpoints: Sequence[Path], files: Mapping[str, bytes], expired: Sequence[str]) -> None:
        """Make one commit of it all, on top of the one that was looked at."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        sources: dict[str, Path | bytes] = {
            f"{CHECKPOINTS}/{path.name}/{name}": path / name
            for path in checkpoints
            for name in (*read_manifest(path).files, MANIFEST)
        }
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=source)
            for name, source in (sources | dict(files)).items()
        ]
        gone = tuple(f"{CHECKPOINTS}/{name}/" for name in expired)
        operations += [CommitOperationDelete(path_in_repo=name) for name in self._names if name.startswith(gone)]
        with self._explained("written") as api:
            message = f"Mirror {', '.join(path.name for path in checkpoints) or 'of a run'}"
            api.create_commit(self.hub_id, operations, commit_message=message, parent_commit=self._commit)

    def _download(self, name: str, folder: Path) -> Path:
        with self._explained("read") as api:
            return Path(api.hf_hub_download(self.hub_id, name, revision=self._commit, local_dir=folder))

    @contextmanager
    def _explained(self, verb: str) -> Iterator[Any]:
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()  # they would run through the lines of the training
        try:
            yield HfApi()
        except Exception as error:  # the client's errors come from several libraries, and differ between its versions
            raise NetworkError(
                f"the mirror {HUB}{self.hub_id} could not be {verb} ({type(error).__name__})",
                fix="check the connection, and log in with a token that may write: hf auth login",
            ) from error
