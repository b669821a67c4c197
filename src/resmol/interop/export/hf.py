"""Export as a Hugging Face folder, for ``AutoModelForCausalLM`` and ``AutoTokenizer``, without remote code.

The tensor names inside resmol are Hugging Face's, so there is nothing to convert: the weights are written as they are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from resmol.audit.run_data import example_prompts
from resmol.checks import Check, Checks
from resmol.errors import UsageError
from resmol.interop.description import description
from resmol.interop.export.card_words import NO_WORDS, CardWords
from resmol.interop.export.exported_tokenizer import TOKENIZER, ExportedTokenizer, exported_tokenizer
from resmol.interop.export.manifest import ExportKind, ExportManifest, build_manifest
from resmol.interop.export.model_card import model_card
from resmol.interop.export.parity import cast_check, compare_with_transformers
from resmol.interop.export.training_record import WEIGHTS_LICENCE, recorded, write_record
from resmol.interop.load import LoadedModel, load_model
from resmol.interop.model_ref import ModelRef
from resmol.model.llama import CausalLM
from resmol.run.checkpoint import weight_tensors
from resmol.run.checkpoint_manifest import WEIGHTS
from resmol.run.tensor_files import write_tensor_file
from resmol.system.atomic_io import commit_directory
from resmol.system.user_paths import user_path
from resmol.system.wording import counted

logger = logging.getLogger(__name__)

LICENCE = "LICENSE"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        path: The folder.
        checks: The comparisons with the model that it was made from.
        files: Name -> sha256 of every file.
    """

    path: Path
    checks: Sequence[Check]
    files: dict[str, str]

    def __repr__(self) -> str:
        return f"Export({self.path}: {counted(len(self.files), 'file')}, {Checks(self.checks)!r})"


def export_hf(
    source: str | Path | ModelRef, out: Path, *, dtype: str = "float32", tokenizer: str | Path | None = None,
    words: CardWords = NO_WORDS,
) -> Export:  # fmt: skip
    """Write a model as a Hugging Face folder.

    Args:
        source: What `load_model` takes: a run, a checkpoint, a folder, a GGUF file, a Hub id.
        out: The folder to create.
        dtype: The dtype of the weights in the file; the error of the cast is measured.
        tokenizer: What `load_model` takes; by default the model's own.
        words: What its owner says about it.

    Returns:
        The export, with the checks that it passed.

    Raises:
        UsageError: ``out`` exists, or the type is unknown.
        CheckFailed: The model that transformers reads back differs from ours; nothing is left of the export.
        DataError: transformers is not installed, or there is no such model.
        DiskFull: No room; nothing is left of the export.
    """
    if dtype not in DTYPES:
        raise UsageError(f"{dtype} is not a type of a Hugging Face export", fix=f"choose from: {', '.join(DTYPES)}")
    require_new(out := user_path(out))
    loaded = load_model(source, tokenizer=tokenizer, device="cpu")

    def write_files(folder: Path) -> list[Check]:
        logger.info(f"writing {loaded.source.path} as {dtype}")
        tokenizer = exported_tokenizer(loaded)
        write_folder(loaded, tokenizer, folder, dtype, words)
        logger.info("reading it back with transformers, in a process of its own")
        stored = rounded(loaded.model, dtype)
        return [*compare_with_transformers(stored, tokenizer, folder), cast_check(loaded.model, stored)]

    return commit_export(out, "model", export_facts(loaded, dtype, words), write_files)


def require_new(out: Path) -> None:
    """Refuse a folder that exists (`UsageError`)."""
    if out.exists():
        raise UsageError(f"{out} exists already", fix="name a folder that does not exist yet, or remove this one")


def export_facts(loaded: LoadedModel, dtype: str, words: CardWords = NO_WORDS) -> dict[str, Any]:
    """Return the facts for the manifest, without paths of this machine: title, dtype and source, prompts to try."""
    source, run = loaded.source.to_dict(), recorded(loaded.source.run)
    title = words.title or (description(loaded.source).name if run is None else run.path.resolve().name)
    model = {name: source[name] for name in ("kind", "sha256", "trained_here", "step", "weights")}
    prompts = [] if run is None else example_prompts(run, loaded.tokenizer)
    return {"title": title, "dtype": dtype, "model": model, "prompts": prompts}


def commit_export(
    out: Path, kind: ExportKind, facts: dict[str, Any], write_files: Callable[[Path], Sequence[Check]]
) -> Export:
    """Create a verified folder with its manifest, or nothing.

    Args:
        out: The folder to create.
        kind: The kind of export.
        facts: For the manifest.
        write_files: Fills the folder that it is given, compares, and returns the checks.

    Raises:
        CheckFailed: A check did not pass; `DiskFull`: no room. Nothing is left.
    """
    checks: list[Check] = []
    manifests: list[ExportManifest] = []

    def manifest(folder: Path) -> bytes:
        manifests.append(build_manifest(folder, kind, checks, facts))
        return manifests[0].to_bytes()

    out.parent.mkdir(parents=True, exist_ok=True)
    commit_directory(out, lambda folder: checks.extend(write_files(folder)), manifest)
    return Export(out, checks, {name: file.sha256 for name, file in manifests[0].files.items()})


def write_folder(
    loaded: LoadedModel, tokenizer: ExportedTokenizer, folder: Path, dtype: str, words: CardWords = NO_WORDS
) -> None:
    """Write all files of an export into an existing, empty folder."""
    tensors = {name: t.to(DTYPES[dtype]).contiguous() for name, t in weight_tensors(loaded.model).items()}
    write_tensor_file(folder / WEIGHTS, tensors)
    tokens = tokenizer.tokens
    config = loaded.config.to_hf(dtype) | ({} if tokens.ends else {"eos_token_id": None})
    pad = {} if tokens.config_pad is None else {"pad_token_id": tokens.config_pad}
    write_json(folder / "config.json", config | pad)
    write_companions(loaded, tokenizer, folder, dtype, words)


def write_companions(
    loaded: LoadedModel, tokenizer: ExportedTokenizer, folder: Path, dtype: str, words: CardWords,
    gguf: str | None = None,
) -> None:  # fmt: skip
    """Write the other files of an export: tokenizer, ends of a text, record of the run, licence and card.

    Args:
        loaded: The model.
        tokenizer: Its tokenizer, for others.
        folder: The export; the weights are in it.
        dtype: The dtype of the weights in the file.
        words: What the owner says about it.
        gguf: The name of a GGUF export's file.
    """
    record = None
    write_json(folder / "generation_config.json", tokenizer.generation_config())
    write_json(folder / "tokenizer_config.json", tokenizer.config(loaded.config.max_position_embeddings))
    (folder / TOKENIZER).write_bytes(tokenizer.data())
    if recorded(loaded.source.run) is not None:
        (folder / "training").mkdir()
        record = write_record(loaded.source, folder / "training")
        if tokenizer.own_path != TOKENIZER:
            (folder / tokenizer.own_path).write_bytes(tokenizer.tokenizer.data)
        if (words.license or record.description.licence) == WEIGHTS_LICENCE:
            text = files("resmol.interop.export") / "templates" / f"{WEIGHTS_LICENCE}.txt"
            (folder / LICENCE).write_bytes(text.read_bytes())
    card = model_card(loaded, tokenizer, dtype, record, gguf, words)
    (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")


def write_json(path: Path, table: dict[str, Any]) -> None:
    """Write a table as indented JSON."""
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8", newline="\n")


def rounded(model: CausalLM, dtype: str) -> CausalLM:
    """Return the model with its weights rounded to a type, computing in float32 as before."""
    if dtype == "float32":
        return model
    copy = CausalLM.empty(model.config)
    copy.load_state_dict({name: t.to(DTYPES[dtype]).to(t.dtype) for name, t in model.state_dict().items()})
    return copy.eval().requires_grad_(requires_grad=False)
