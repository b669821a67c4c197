"""Which weights speak, and what is recorded about them: nothing that the files themselves do not prove."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from resmol.errors import CheckpointError
from resmol.interop.export.manifest import ExportManifest, parse_seal
from resmol.interop.load import LoadedModel
from resmol.run.checkpoint_manifest import MANIFEST, WEIGHTS
from resmol.run.directory import RunDir

TRAINING = "training"


@dataclass(frozen=True)
class Identity:
    """What the page says about the weights.

    Attributes:
        title: One line for a person.
        step: The optimizer step that they were saved after; None for weights from elsewhere.
        sha256: Of the checkpoint's manifest, or of the weight file.
        record: Where the record of their training lies, if it is at hand.
    """

    title: str
    step: int | None
    sha256: str
    record: RunDir | None


def identify(loaded: LoadedModel, folder: Path | None = None) -> Identity:
    """Say which weights ``loaded`` holds.

    Args:
        loaded: The model.
        folder: The export that it belongs to, when its weight file lies elsewhere.

    Raises:
        CheckpointError: The export's manifest speaks of another weight file than the one that was loaded.
    """
    found = loaded.provenance
    if found.kind == "checkpoint":
        run = RunDir(found.path.parent.parent)
        title = f"checkpoint {found.path.name} of {run.path.resolve().name}"
        return Identity(title, found.step, found.sha256, _with_ledger(run))
    file = found.path.name if found.path.is_file() and folder is None else WEIGHTS  # a GGUF file, or a folder's weights
    home = folder or (found.path if found.path.is_dir() else found.path.parent)
    seal = _seal(home)
    if seal is not None and file != WEIGHTS and file not in seal.files:
        seal = None  # a file of its own, which only lies in the folder of an export
    if seal is None:
        title = (
            f"{home.name if folder else found.path.name} ({found.kind}; not trained by resmol as far as its files say)"
        )
        return Identity(title, None, found.sha256, None)
    expected = seal.files[file].sha256 if file in seal.files else None
    if expected != found.sha256:
        raise CheckpointError(
            f"{home / MANIFEST} speaks of weights with sha256 {str(expected)[:16]}, loaded were {found.sha256[:16]}",
            fix="export the model again; these weights are not the ones that the export was checked with",
        )
    origin, record = seal.facts.get("model", {}), _with_ledger(RunDir(home / TRAINING))
    step = origin.get("step") if isinstance(origin.get("step"), int) else None
    title = "export of a checkpoint" if step is not None else f"export of {str(origin.get('kind'))[:20]} weights"
    return Identity(title, step, found.sha256, record)


def _with_ledger(run: RunDir) -> RunDir | None:
    return run if run.exists() and run.ledger.is_file() else None


def _seal(folder: Path) -> ExportManifest | None:
    """Return the seal of an export of ours; a folder from elsewhere has none."""
    try:
        return parse_seal((folder / MANIFEST).read_bytes())
    except OSError:
        return None
