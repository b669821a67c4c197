"""Identify the loaded weights and find their training record, by what the files themselves prove."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from resmol.audit.run_data import MOST_PROMPTS, example_prompts
from resmol.errors import CheckpointError
from resmol.interop.export.card_words import MAX_TITLE
from resmol.interop.export.manifest import ExportManifest, parse_manifest
from resmol.interop.export.training_record import recorded
from resmol.interop.load import LoadedModel
from resmol.run.checkpoint_manifest import MANIFEST, WEIGHTS
from resmol.run.directory import RunDir

TRAINING = "training"
ANY_PROMPTS = ("Once upon a time", "The meaning of life is")
MAX_PROMPT = 100  # characters of one that a manifest names


@dataclass(frozen=True)
class Provenance:
    """Which weights the page serves.

    Attributes:
        title: One line for a person.
        step: The optimizer step that they were saved after; None for weights from elsewhere.
        sha256: Of the checkpoint's manifest, or of the weight file.
        record: The record of their training, if it is at hand.
        prompts: Texts to try, in the manner of what the model was trained on where that is known.
    """

    title: str
    step: int | None
    sha256: str
    record: RunDir | None
    prompts: tuple[str, ...] = ANY_PROMPTS


def provenance_of(loaded: LoadedModel, folder: Path | None = None, title: str | None = None) -> Provenance:
    """Return which weights ``loaded`` holds.

    Args:
        loaded: The model.
        folder: The export that it belongs to, when its weight file lies elsewhere.
        title: What its owner calls it; by default what the export says.

    Raises:
        CheckpointError: The export's manifest lists another weight file than the one that was loaded.
    """
    found = loaded.source
    if found.trained_here:
        title = f"checkpoint {found.path.name}" + (f" of {found.run.path.resolve().name}" if found.run else "")
        title += ", averaged weights" if found.averaged else ""
        run = recorded(found.run)
        prompts = () if run is None else tuple(example_prompts(run, loaded.tokenizer))
        return Provenance(title, found.step, found.sha256, run, prompts or ANY_PROMPTS)
    file = found.path.name if found.path.is_file() and folder is None else WEIGHTS  # a GGUF file, or a folder's weights
    home = folder or (found.path if found.path.is_dir() else found.path.parent)
    manifest = _manifest(home)
    if manifest is not None and file != WEIGHTS and file not in manifest.files:
        manifest = None  # a file of its own, which only lies in the folder of an export
    if manifest is None:
        name = home.name if folder else found.path.name
        title = f"{name} ({found.kind}; not trained by resmol as far as its files show)"
        return Provenance(title, None, found.sha256, None)
    expected = manifest.files[file].sha256 if file in manifest.files else None
    if expected != found.sha256:
        raise CheckpointError(
            f"{home / MANIFEST} lists weights with sha256 {str(expected)[:16]}, loaded were {found.sha256[:16]}",
            fix="export the model again; these weights are not the ones that the export was checked with",
        )
    origin, record = manifest.facts.get("model", {}), recorded(RunDir(home / TRAINING))
    step = origin.get("step") if isinstance(origin.get("step"), int) else None
    averaged = ", averaged weights" if origin.get("weights") == "averaged" else ""
    origins = averaged if step is not None else f" (weights from elsewhere: {str(origin.get('kind'))[:20]})"
    title = title or export_title(home) or "an export"
    return Provenance(title + origins, step, found.sha256, record, _prompts(manifest))


def _prompts(manifest: ExportManifest) -> tuple[str, ...]:
    """Return the prompts that an export names; anybody may have written its manifest."""
    named = manifest.facts.get("prompts")
    texts = [text for text in named if isinstance(text, str)] if isinstance(named, list) else []
    return tuple(text[:MAX_PROMPT] for text in texts[:MOST_PROMPTS] if text.strip()) or ANY_PROMPTS


def export_title(folder: Path) -> str | None:
    """Return what the manifest of an export calls it; None where it is none of ours, or has no title."""
    manifest = _manifest(folder)
    title = manifest.facts.get("title") if manifest is not None else None
    return title[:MAX_TITLE] if isinstance(title, str) else None


def _manifest(folder: Path) -> ExportManifest | None:
    """Return the manifest of an export of ours; a folder from elsewhere has none."""
    try:
        return parse_manifest((folder / MANIFEST).read_bytes())
    except OSError:
        return None
