"""The manifest of an export: its files, and the checks that it passed before it got its name.

``manifest.json`` is the file that `commit_directory` writes last. `publish` sends the files that the manifest lists and
no others, and only while every byte is as the manifest says. Its digest finds accidents; it is not a signature.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import ValidationError

from resmol.checks import Check, all_passed
from resmol.config.strict_model import StrictModel
from resmol.errors import CheckFailed, DataError
from resmol.interop.description import CARD
from resmol.run.checkpoint_manifest import MANIFEST, MAX_JSON_BYTES
from resmol.system.atomic_io import file_sha256, fsync_path
from resmol.system.wording import counted
from resmol.version import __version__

logger = logging.getLogger(__name__)
ExportKind = Literal["model", "space", "gguf"]
# By the file managers of macOS, Windows and NAS systems, and by Jupyter.
LEFT_BEHIND = re.compile(r"(^|/)(\.DS_Store|\._[^/]*|[Tt]humbs\.db|[Dd]esktop\.ini|@eaDir/.*|\.ipynb_checkpoints/.*)$")


class ExportedFile(StrictModel):
    """Size and sha256 of a file."""

    bytes: int
    sha256: str


class PassedCheck(StrictModel):
    """A check that the export passed, and what was measured."""

    name: str
    measured: str


class ExportManifest(StrictModel):
    """The content of an export's ``manifest.json``.

    Attributes:
        kind: The kind of repository that the folder is meant for.
        resmol: The version that wrote it.
        checks: The comparisons that passed before the folder got its name; never empty.
        facts: Other facts, such as the dtype of the weights and their source.
        files: Path below the folder, with ``/`` -> size and sha256, of every file but the manifest itself.
    """

    format: Literal[2] = 2
    kind: ExportKind
    resmol: str
    checks: tuple[PassedCheck, ...]
    facts: dict[str, Any]
    files: dict[str, ExportedFile]

    @property
    def sha256(self) -> str:
        """Digest of the fields."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """Return the content of ``manifest.json``: the fields, and the digest that covers them."""
        return json.dumps({**self.model_dump(mode="json"), "sha256": self.sha256}, indent=1, sort_keys=True).encode()


def build_manifest(folder: Path, kind: ExportKind, checks: Sequence[Check], facts: dict[str, Any]) -> ExportManifest:
    """Flush the files of a folder to the disk and return their manifest.

    `ExportManifest.to_bytes` gives the content of ``manifest.json`` for `commit_directory`.

    Args:
        folder: All its files are listed; they must be complete.
        kind: What the folder is.
        checks: The checks of the export.
        facts: Plain JSON values; no path of this machine.

    Raises:
        CheckFailed: A check failed, or there was none.
    """
    if not all_passed(checks):
        failed = [f"{check.name}: {check.measured}" for check in checks if not check.passed]
        raise CheckFailed(
            f"the export is not the model: {'; '.join(failed) or 'nothing was compared'}",
            fix="nothing was written; check the versions of transformers and tokenizers, or report this as a bug",
        )
    files = {}
    for name in sorted(_present(folder) - {MANIFEST}):
        fsync_path(folder / name)
        files[name] = ExportedFile(bytes=(folder / name).stat().st_size, sha256=file_sha256(folder / name))
    passed = tuple(PassedCheck(name=check.name, measured=check.measured) for check in checks)
    return ExportManifest(kind=kind, resmol=__version__, checks=passed, facts=facts, files=files)


def parse_manifest(content: bytes) -> ExportManifest | None:
    """Return the manifest that these bytes hold, or None where they hold none or were changed."""
    try:
        fields = json.loads(content)
        fields.pop("sha256")
        manifest = ExportManifest.model_validate_json(json.dumps(fields))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError):
        return None
    whole = manifest.to_bytes() == content and bool(manifest.checks) and bool(manifest.files)
    return manifest if whole and all(_is_plain(name) for name in manifest.files) else None


def verify_export(folder: Path) -> ExportManifest:
    """Check every byte of an export against its manifest, and return the manifest.

    Raises:
        DataError: There is no such folder.
        CheckFailed: It has no manifest, or a file is missing, changed or additional; the message names it. What file
            managers and editors leave behind is ignored, and not published.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}", fix="name a folder that `resmol export` wrote")
    path = folder / MANIFEST
    manifest = None
    if path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_JSON_BYTES:
        manifest = parse_manifest(path.read_bytes())
    if manifest is None:
        raise CheckFailed(
            f"{folder} is not an export that resmol has verified: its {MANIFEST} is missing or not as it was written",
            fix="write it with `resmol export MODEL OUT`, which compares before it finishes",
        )
    present = _present(folder) - {MANIFEST}
    extra = sorted(present - manifest.files.keys())
    if left := [name for name in extra if LEFT_BEHIND.search(name)]:
        logger.warning(f"{folder} also holds {', '.join(left[:5])}{', …' * (len(left) > 5)}: ignored, not published")
    if extra := sorted({*extra} - {*left}):
        raise CheckFailed(
            f"{folder} holds files that the export did not write: {', '.join(extra[:5])}{', …' * (len(extra) > 5)}",
            fix="move them out of the folder; only what was verified is published",
        )
    for name, entry in manifest.files.items():
        if name not in present:
            raise _changed(folder, name, "is missing")
        if (size := (folder / name).stat().st_size) != entry.bytes:
            raise _changed(folder, name, f"has {counted(size, 'byte')}; {entry.bytes:,} when it was verified")
        if file_sha256(folder / name) != entry.sha256:
            raise _changed(folder, name, "was changed after it was verified")
    return manifest


def _changed(folder: Path, name: str, what: str) -> CheckFailed:
    fix = "export again into a new folder"
    if name == CARD:
        fix += "; your own words go into a file, which `resmol export` and `resmol publish` take as --card FILE"
    return CheckFailed(f"{folder / name} {what}", fix=fix)


def _present(folder: Path) -> set[str]:
    """Return all files below a folder (`CheckFailed` on anything that is neither a file nor a folder)."""
    found = set()
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise _changed(folder, path.relative_to(folder).as_posix(), "is a link, or no file at all")
        if path.is_file():
            found.add(path.relative_to(folder).as_posix())
    return found


def _is_plain(name: str) -> bool:
    parts = PurePosixPath(name).parts
    sound = bool(parts) and "/".join(parts) == name and not {"..", "/"} & set(parts) and parts[0] != ".git"
    return sound and name != MANIFEST and name.isprintable() and "\\" not in name
