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
from safetensors.torch import save_file

from resmol.checks import Check
from resmol.data.tokenizer import Tokenizer
from resmol.errors import UsageError
from resmol.interop.export.manifest import ExportManifest, Kind, write_manifest
from resmol.interop.export.model_card import model_card
from resmol.interop.export.parity import cast_check, compare_with_transformers
from resmol.interop.export.training_record import write_record
from resmol.interop.load import LoadedModel, load_model
from resmol.interop.resolve import Provenance
from resmol.model.llama import CausalLM
from resmol.run.checkpoint import weight_tensors
from resmol.run.directory import RunDir
from resmol.system.atomic_io import commit_directory

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        path: The folder.
        checks: How it was compared with the model that it comes from.
        files: Name -> sha256 of every file.
    """

    path: Path
    checks: Sequence[Check]
    files: dict[str, str]


def export_hf(source: str | Path, out: Path, *, dtype: str = "float32") -> Export:
    """Write a model as a Hugging Face folder.

    Args:
        source: What `load_model` takes: a run, a checkpoint, a folder, a GGUF file, a Hub id.
        out: The folder to create.
        dtype: The type of the weights in the file; the error that the cast causes is measured.

    Returns:
        The export, with the checks that it passed.

    Raises:
        UsageError: ``out`` exists, or the type is unknown.
        CheckFailed: What transformers reads back differs from ours; nothing is left of the export.
        DataError: transformers is not installed, or there is no such model.
        DiskFull: No room; nothing is left of the export.
    """
    if dtype not in DTYPES:
        raise UsageError(f"{dtype} is not a type of a Hugging Face export", fix=f"choose from: {', '.join(DTYPES)}")
    require_new(out)
    loaded = load_model(source, device="cpu")

    def write_files(folder: Path) -> list[Check]:
        logger.info(f"writing {loaded.provenance.path} as {dtype}")
        write_folder(loaded, folder, dtype, run_of(loaded.provenance))
        logger.info("reading it back with transformers, in a process of its own")
        stored = rounded(loaded.model, dtype)
        return [*compare_with_transformers(stored, loaded.tokenizer, folder), cast_check(loaded.model, stored)]

    return commit_export(out, "model", export_facts(loaded, dtype), write_files)


def require_new(out: Path) -> None:
    """Refuse a folder that exists (`UsageError`)."""
    if out.exists():
        raise UsageError(f"{out} exists already", fix="name a folder that does not exist yet, or remove this one")


def export_facts(loaded: LoadedModel, dtype: str) -> dict[str, Any]:
    """Return what the seal says about the weights: their type and source, without paths of this machine."""
    return {"dtype": dtype, "model": loaded.provenance.to_dict() | {"path": "", "note": ""}}


def commit_export(out: Path, kind: Kind, facts: dict[str, Any], write_files: Callable[[Path], list[Check]]) -> Export:
    """Create a sealed folder, or nothing.

    Args:
        out: The folder to create.
        kind: What it is.
        facts: For its seal.
        write_files: Fills the folder that it is given, compares, and returns the checks.

    Raises:
        CheckFailed: A check did not pass; `DiskFull`: no room. Nothing is left.
    """
    checks: list[Check] = []
    seals: list[ExportManifest] = []

    def seal(folder: Path) -> bytes:
        seals.append(write_manifest(folder, kind, checks, facts))
        return seals[0].to_bytes()

    out.parent.mkdir(parents=True, exist_ok=True)
    commit_directory(out, lambda folder: checks.extend(write_files(folder)), seal)
    return Export(out, checks, {name: file.sha256 for name, file in seals[0].files.items()})


def write_folder(loaded: LoadedModel, folder: Path, dtype: str, run: RunDir | None) -> None:
    """Write all files of an export into an existing, empty folder."""
    config = loaded.config
    tensors = {name: t.to(DTYPES[dtype]).contiguous() for name, t in weight_tensors(loaded.model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    write_json(folder / "config.json", config.to_hf(dtype))
    write_json(folder / "generation_config.json", ends)
    write_papers(loaded, folder, dtype, run)


def write_papers(loaded: LoadedModel, folder: Path, dtype: str, run: RunDir | None, gguf: str | None = None) -> None:
    """Write what goes with the weights: tokenizer, record, licence and card (``gguf``: name of the weights' file)."""
    tokenizer, record = loaded.tokenizer, None
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, loaded.config.max_position_embeddings))
    (folder / "tokenizer.json").write_bytes(tokenizer.data)
    if run is not None:
        (folder / "training").mkdir()
        record = write_record(run, folder / "training", loaded.provenance)
        (folder / "LICENSE").write_bytes((files("resmol.interop.export") / "templates" / "apache-2.0.txt").read_bytes())
    (folder / "README.md").write_text(model_card(loaded, dtype, record, gguf), encoding="utf-8")


def write_json(path: Path, table: dict[str, Any]) -> None:
    """Write a table as people read it."""
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def tokenizer_config(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """Return ``tokenizer_config.json``.

    The class matters: for ``GPT2Tokenizer``, which SmolLM2's own file names, transformers 5 builds a pre-tokenizer of
    its own and drops the step that separates digits, so that "a  1" gets other ids. ``PreTrainedTokenizerFast`` takes
    ``tokenizer.json`` as it is.
    """
    end = token_text(tokenizer, tokenizer.eos_id)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as it is written in the vocabulary, such as ``<|endoftext|>``."""
    return tokenizer.decode([token])


def rounded(model: CausalLM, dtype: str) -> CausalLM:
    """Return the model with its weights rounded to a type, computing in float32 as before."""
    if dtype == "float32":
        return model
    copy = CausalLM.empty(model.config)
    copy.load_state_dict({name: t.to(DTYPES[dtype]).to(t.dtype) for name, t in model.state_dict().items()})
    return copy.eval().requires_grad_(requires_grad=False)


def run_of(provenance: Provenance) -> RunDir | None:
    """Return the run whose checkpoint these weights are; what merely lies inside of a run's folder is not its work."""
    run = RunDir(provenance.path.resolve().parent.parent)
    return run if provenance.trained_here and run.exists() and run.ledger.exists() else None
