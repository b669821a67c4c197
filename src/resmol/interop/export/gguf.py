"""Export as a GGUF file, for llama.cpp, ollama and programs that are built on them."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

from resmol.audit.run_data import recorded_data
from resmol.checks import Check
from resmol.config.model_config import ModelConfig
from resmol.errors import UsageError
from resmol.interop.description import Description, description
from resmol.interop.export.card_words import NO_WORDS, CardWords
from resmol.interop.export.exported_tokenizer import exported_tokenizer
from resmol.interop.export.gguf_parity import compare_gguf, gguf_readers
from resmol.interop.export.gguf_writer import KINDS, Q8_BLOCK, share_of_type, write_gguf
from resmol.interop.export.hf import Export, commit_export, export_facts, require_new, write_companions
from resmol.interop.export.modelfile import MODELFILE, modelfile
from resmol.interop.export.training_record import describe_run, recorded
from resmol.interop.load import load_model
from resmol.interop.model_ref import ModelRef
from resmol.interop.resolve import Source
from resmol.system.user_paths import user_path

logger = logging.getLogger(__name__)

SMALLEST_SHARE = 0.1  # of the numbers of a file that is named after a type


def export_gguf(
    source: str | Path | ModelRef, out: Path, *, dtype: str = "float32", tokenizer: str | Path | None = None,
    words: CardWords = NO_WORDS,
) -> Export:  # fmt: skip
    """Write a model as a folder with a GGUF file.

    Args:
        source: What `load_model` takes: a run, a checkpoint, a folder, a GGUF file, a Hub id.
        out: The folder to create.
        dtype: One of `KINDS`; the error of the rounding is measured and bounded.
        tokenizer: What `load_model` takes; by default the model's own.
        words: What its owner says about it.

    Returns:
        The export, with the checks that it passed.

    Raises:
        UsageError: ``out`` exists, the type is unknown, or hardly any number could have it.
        CheckFailed: A reader gets another model out of the file than ours; nothing is left of the export.
        DataError: There is no such model, no installed library can read the file back, or GGUF cannot describe the
            tokenizer.
        DiskFull: No room; nothing is left of the export.
    """
    if dtype not in KINDS:
        raise UsageError(f"{dtype} is not a type of a GGUF export", fix=f"choose from: {', '.join(KINDS)}")
    require_new(out := user_path(out))
    readers = gguf_readers()
    loaded = load_model(source, tokenizer=tokenizer, device="cpu")
    share = _require_type(loaded.config, dtype)
    run = recorded(loaded.source.run)
    name = plain_name(out.resolve().name if run is None else run.path.resolve().name)
    file_name = f"{name}-{KINDS[dtype]}.gguf"

    def write_files(folder: Path) -> list[Check]:
        logger.info(f"writing {loaded.source.path} as {file_name}")
        tokenizer = exported_tokenizer(loaded)
        about = _description(loaded.source, name, words)
        write_gguf(folder / file_name, loaded.model, tokenizer, dtype, about)
        (folder / MODELFILE).write_text(modelfile(tokenizer, loaded.config, file_name), encoding="utf-8", newline="\n")
        write_companions(loaded, tokenizer, folder, dtype, words, file_name)
        logger.info(
            f"reading it back with {' and '.join(reader.name for reader in readers)}, each in a process of its own"
        )
        return compare_gguf(loaded.model, tokenizer, folder / file_name, dtype, readers)

    facts = export_facts(loaded, dtype, words) | {
        "share_of_dtype": round(share, 4),
        "readers": [reader.name for reader in readers],
    }
    return commit_export(out, "gguf", facts, write_files)


def _description(source: Source, name: str, words: CardWords) -> Description:
    """Return what the file states about the model, under a name that needs no quoting."""
    run = recorded(source.run)
    if run is None:
        about = description(source)
    else:
        data = recorded_data(run, run.load_config())
        about = describe_run(name, None if data is None else data.manifest)
    return replace(
        about,
        name=words.title or about.name or name,
        languages=words.languages or about.languages,
        licence=words.license or about.licence,
    )


def _require_type(config: ModelConfig, dtype: str) -> float:
    """Return the share of the numbers that get the type; refuse a file that would have a name and little else of it."""
    share = share_of_type(config, dtype)
    if share < SMALLEST_SHARE:
        raise UsageError(
            f"{share:.1%} of the numbers would be {KINDS[dtype]}, the rest F16: rows of hidden_size "
            f"({config.hidden_size}) numbers cannot be cut into blocks of {Q8_BLOCK}",
            fix="take --dtype float16, which nearly all of the file would be anyway",
        )
    return share


def plain_name(name: str) -> str:
    """Return a name that needs no quoting in a Modelfile, a shell or a web address."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "model"
