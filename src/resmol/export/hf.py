"""Export as a Hugging Face folder, for ``AutoModelForCausalLM`` and ``AutoTokenizer``, without remote code.

The tensor names inside resmol are Hugging Face's, so there is nothing to convert: the weights are written as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from resmol.atomic import commit_directory, fsync_path
from resmol.checkpoint import weight_tensors
from resmol.checks import Check, all_passed
from resmol.errors import CheckFailed, UsageError
from resmol.export.card import model_card
from resmol.export.comparison import compare_with_transformers
from resmol.load import LoadedModel, load_model
from resmol.manifest import file_entry
from resmol.model import CausalLM
from resmol.rundir import RunDir
from resmol.tokenizer import Tokenizer

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


def export_hf(
    source: str | Path, out: Path, *, dtype: str = "float32", say: Callable[[str], None] = lambda _: None
) -> Export:
    """Write a model as a Hugging Face folder.

    Args:
        source: What `load_model` takes: a run, a checkpoint, a folder, a GGUF file, a Hub id.
        out: The folder to create.
        dtype: The type of the weights in the file; the error that the cast causes is measured.
        say: Receives a sentence before each slow part.

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
    if out.exists():
        raise UsageError(f"{out} exists already", fix="name a folder that does not exist yet, or remove this one")
    loaded = load_model(source, device="cpu", say=say)
    checks: list[Check] = []
    entries: dict[str, str] = {}

    def write_files(folder: Path) -> None:
        say(f"writing {loaded.provenance.path} as {dtype}")
        write_folder(loaded, folder, dtype, _run_of(source))
        say("reading it back with transformers, in a process of its own")
        checks.extend(compare_with_transformers(rounded(loaded.model, dtype), loaded.tokenizer, folder))
        checks.append(_cast_error(loaded.model, dtype))
        if not all_passed(checks):
            failed = [f"{check.name}: {check.measured}" for check in checks if not check.passed]
            raise CheckFailed(
                f"the export is not the model: {'; '.join(failed)}",
                fix="nothing was written; check the versions of transformers and tokenizers, or report this",
            )

    def manifest(folder: Path) -> bytes:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            fsync_path(path)
            entries[str(path.relative_to(folder))] = file_entry(path, {}).sha256
        record = {"format": 1, "dtype": dtype, "model": loaded.provenance.to_dict() | {"path": ""}, "files": entries}
        return json.dumps(record, indent=1, sort_keys=True).encode()

    out.parent.mkdir(parents=True, exist_ok=True)
    commit_directory(out, write_files, manifest)
    return Export(out, checks, entries)


def write_folder(loaded: LoadedModel, folder: Path, dtype: str, run: RunDir | None) -> None:
    """Write all files of an export into an existing, empty folder."""
    config, tokenizer = loaded.config, loaded.tokenizer
    tensors = {name: t.to(DTYPES[dtype]).contiguous() for name, t in weight_tensors(loaded.model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tables = {
        "config.json": config.to_hf(dtype),
        "generation_config.json": {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
        },
        "tokenizer_config.json": tokenizer_config(tokenizer, config.max_position_embeddings),
    }
    for name, table in tables.items():
        (folder / name).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(tokenizer.data)
    (folder / "README.md").write_text(model_card(loaded, dtype, run), encoding="utf-8")
    if run is not None:
        (folder / "training").mkdir()
        for path in (run.config, run.ledger):
            (folder / "training" / path.name).write_bytes(path.read_bytes())
        if claims := run.claims():
            (folder / "training" / run.evidence.name).mkdir()
            text = json.dumps({"checks": claims}, indent=1) + "\n"
            (folder / "training" / run.evidence.name / "claims.json").write_text(text, encoding="utf-8")


def tokenizer_config(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """Return ``tokenizer_config.json``.

    The class matters: for ``GPT2Tokenizer``, which SmolLM2's own file names, transformers 5 builds a pre-tokenizer of
    its own and drops the step that separates digits, so that "a  1" gets other ids. ``PreTrainedTokenizerFast`` takes
    ``tokenizer.json`` as it is, in transformers 4 and 5.
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


@torch.no_grad()
def _cast_error(model: CausalLM, dtype: str) -> Check:
    ids = torch.arange(64)[None] % model.config.vocab_size
    ids = ids[:, : model.config.max_position_embeddings]
    before, after = model(ids).log_softmax(-1), rounded(model, dtype)(ids).log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    return Check(
        "cast",
        bool(torch.isfinite(after).all()),
        f"largest change of a log-probability {float((before - after).abs().max()):.2e}, "
        f"Kullback-Leibler divergence {divergence:.1e} nats per token",
        "finite numbers; the change is that of the type",
        "Weights beyond the largest number of float16.",
    )


def _run_of(source: str | Path) -> RunDir | None:
    """Return the run that a source is, or a checkpoint of."""
    path = Path(source)
    for candidate in (path, path.parent.parent):
        run = RunDir(candidate)
        if run.exists() and run.ledger.exists():
            return run
    return None
