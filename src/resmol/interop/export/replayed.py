"""Compare an export with the checkpoint that it says it was made from: the last stage of `resmol audit --replay all`.

Its manifest was made by whoever made the export, so only the files count: weights bit for bit, architecture, tokenizer,
and the copy of the ledger.
"""

from __future__ import annotations

from pathlib import Path

import torch

from resmol.audit.segment import Outcome
from resmol.checks import Check
from resmol.errors import CheckFailed, ResmolError
from resmol.interop.export.exported_tokenizer import TOKENIZER, exported_tokenizer
from resmol.interop.export.gguf_writer import as_stored
from resmol.interop.export.hf import rounded
from resmol.interop.export.manifest import ExportManifest, verify_export
from resmol.interop.load import LoadedModel, load_model
from resmol.interop.model_ref import ModelRef
from resmol.run.checkpoint import weight_tensors
from resmol.run.checkpoint_manifest import WEIGHTS, checkpoint_name
from resmol.run.directory import RunDir
from resmol.system.user_paths import user_path
from resmol.system.wording import counted

EXPECTED = "every file as written, with weights, architecture and tokenizer of the checkpoint that it names"
OF_TEXT = {"bos_token_id", "eos_token_id", "initializer_range"}  # an export says in other files where a text ends


def check_export(folder: Path, run: RunDir, *, strict: bool = False) -> Check:
    """Check an export against its run.

    Args:
        folder: What `resmol export` wrote: a Hugging Face folder, a GGUF folder, or a Space.
        run: The run; its checkpoints were checked against its ledger.
        strict: An export that cannot be judged here is a failure.

    Raises:
        DataError: There is no such folder.
    """
    try:
        outcome = _judge(user_path(folder), run)
    except CheckFailed as error:
        outcome = Outcome("FAIL", error.what)
    return outcome.check("export", strict=strict, expected=EXPECTED)


def _judge(folder: Path, run: RunDir) -> Outcome:
    manifest = verify_export(folder)
    if manifest.kind == "space":
        folder = folder / "model"
        if not (folder / WEIGHTS).exists():
            repository = manifest.facts.get("model_repo")
            return Outcome("UNSUPPORTED", f"the Space fetches its weights from {repository}: compare that export")
        manifest = verify_export(folder)
    source = manifest.facts.get("model", {})
    path = run.checkpoints / checkpoint_name(source.get("step") or 0)
    if not source.get("trained_here"):
        return Outcome("FAIL", "it was not made from a checkpoint of a run")
    if not path.is_dir():
        return Outcome("UNSUPPORTED", f"it was made from {path.name}, which the run does not keep any more")
    ours = load_model(ModelRef(path, source["weights"]), device="cpu")
    if ours.source.sha256 != source["sha256"]:
        words = f"it names a {path.name} with manifest {source['sha256'][:16]}; that of the run has"
        return Outcome("FAIL", f"{words} {ours.source.sha256[:16]}")
    try:
        theirs = load_model(folder, device="cpu")
    except ResmolError as error:
        return Outcome("FAIL", error.what)
    if wrong := _first_difference(ours, theirs, manifest, folder, run):
        return Outcome("FAIL", f"{wrong} than {path.name}", evidence=str(folder))
    tensors = counted(len(weight_tensors(ours.model)), "tensor")
    words = f"{counted(len(manifest.files), 'file')}; the {tensors} of {path.name} as {manifest.facts['dtype']}"
    also = "its architecture" if manifest.kind == "gguf" else "its architecture and tokenizer"
    return Outcome("PASS", f"{words}, {also}", evidence=str(folder))


def _first_difference(
    ours: LoadedModel, theirs: LoadedModel, manifest: ExportManifest, folder: Path, run: RunDir
) -> str | None:
    """Return what is other in an export, to be followed by "than" and its checkpoint; None where nothing is."""
    architectures = [model.config.model_dump(exclude=OF_TEXT) for model in (ours, theirs)]
    for name, value in architectures[0].items():
        if architectures[1][name] != value:
            return f"its {name} is {architectures[1][name]} and not {value}: another architecture"
    is_gguf = manifest.kind == "gguf"
    dtype = manifest.facts["dtype"]
    expected = weight_tensors(as_stored(ours.model, dtype) if is_gguf else rounded(ours.model, dtype))
    found = weight_tensors(theirs.model)
    if other := [name for name in expected if not torch.equal(expected[name], found[name])]:
        return f"{other[0]} holds other numbers"
    if not is_gguf and (folder / TOKENIZER).read_bytes() != exported_tokenizer(ours).data():
        return f"{TOKENIZER} is another one"
    record = folder / "training" / "ledger.jsonl"
    if record.exists() and not run.ledger.read_bytes().startswith(record.read_bytes()):
        return f"{record.relative_to(folder).as_posix()} is another ledger"
    return None
