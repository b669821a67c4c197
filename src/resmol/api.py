"""The commands as Python functions: same words, typed results, nothing printed.

`train_model`, `audit_run`, `evaluate_model`, `report_run` and `load_model` live beside what they call; these take the
options of `prepare`, `verify` and `export`. Each raises a `ResmolError` that says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from resmol.checks import Checks
from resmol.config.load import load_preset
from resmol.config.run_config import RunConfig
from resmol.data.resolve import Text, prepare_text
from resmol.data.shards import Dataset
from resmol.data.text_file import ReadOptions
from resmol.data.tokenizer import load_tokenizer
from resmol.demo.space import export_space
from resmol.errors import UsageError
from resmol.interop.export import Export, export_gguf, export_hf
from resmol.interop.export.card_words import NO_WORDS, CardWords
from resmol.interop.model_ref import ModelRef
from resmol.verify import verify_model as _verify_model


def prepare_data(
    out: str | Path,
    input: str | Path | Sequence[str | Path] = (),  # noqa: A002 - the option's name
    *,
    val: str | Path | Sequence[str | Path] = (),
    corpus: str | None = None,
    tokenizer: str | Path | None = None,
    val_fraction: float = 0.01,
    text_field: str = "text",
    encoding: str | None = None,
    format: Literal["auto", "text", "jsonl", "csv"] = "auto",  # noqa: A002
    include_hidden: bool = False,
    special_tokens: Literal["as-tokens", "as-text"] = "as-tokens",
    dedup: bool = False,
    max_tokens: int | None = None,
    sample_seed: int | None = None,
) -> Dataset:
    """Turn text into token shards and a manifest, as `resmol prepare` does.

    Args:
        out: The folder to write.
        input: Files and folders of text, JSON lines or tables.
        val: Files and folders to hold out, all of them and nothing else.
        corpus: One of `data.builtin_corpora.CORPORA`, e.g. ``shakespeare``, instead of an input.
        tokenizer: A ``tokenizer.json``, its folder, or a Hub id; None takes SmolLM2's.
        val_fraction: Share of the documents to hold out where the text does not say what is.
        text_field: The field or column with the text; of several, separated by commas, the first that is there.
        encoding: Of text without a byte order mark; None is UTF-8.
        format: What every input is.
        include_hidden: Also read hidden files of a folder.
        special_tokens: What the spelling of a control token in the text becomes.
        dedup: Leave out exact copies of documents.
        max_tokens: How many tokens to take of the text, about; None takes all.
        sample_seed: Draws the order of files and of the row groups of Parquet files, for ``max_tokens``.

    Returns:
        The prepared data; its ``root`` is what `train_model` takes as ``data``.
    """
    options = ReadOptions(text_field, encoding, format, include_hidden, sample_seed)
    text = Text(_paths(input), _paths(val), corpus, val_fraction, options, special_tokens, dedup, max_tokens)
    return prepare_text(Path(out), text, load_tokenizer(tokenizer))


def verify_model(config: RunConfig | str = "smollm2-135m", *, weights: str = "random") -> Checks:
    """Check an architecture against transformers, as `resmol verify` does.

    Args:
        config: A configuration, or the name of a preset; it says the architecture of random weights.
        weights: ``random``, or whatever `load_model` takes, which brings its own architecture.
    """
    chosen = load_preset(config) if isinstance(config, str) else config
    return Checks(_verify_model(chosen.model, weights))


def export_model(
    model: str | Path | ModelRef,
    out: str | Path,
    *,
    format: str = "hf",  # noqa: A002
    dtype: str = "float32",
    space: bool = False,
    model_repo: str | None = None,
    tokenizer: str | Path | None = None,
    words: CardWords = NO_WORDS,
) -> Export:
    """Write a folder for other software, read back before it exists, as `resmol export` does.

    Args:
        model: Whatever `load_model` takes.
        out: The folder to create.
        format: ``hf``, a Hugging Face folder, or ``gguf``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; with GGUF also ``q8_0``.
        space: Write a Space with the demo, the weights and the record.
        model_repo: With ``space``: ``OWNER/NAME`` of the model repository that holds the weights.
        tokenizer: What `load_model` takes; None is the model's own.
        words: What the model card says beside the facts.

    Raises:
        UsageError: The options do not fit each other.
    """
    if format not in ("hf", "gguf"):
        raise UsageError(f"{format} is not a format of an export", fix="choose from: hf, gguf")
    if space and format != "hf":
        raise UsageError("a Space serves a Hugging Face folder", fix="leave --format out")
    if model_repo is not None and not space:
        raise UsageError("--model-repo is for a Space", fix="add --space")
    target = Path(out)
    if space:
        return export_space(model, target, dtype=dtype, model_repo=model_repo, tokenizer=tokenizer, words=words)
    if format == "gguf":
        return export_gguf(model, target, dtype=dtype, tokenizer=tokenizer, words=words)
    return export_hf(model, target, dtype=dtype, tokenizer=tokenizer, words=words)


def _paths(given: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    return (str(given),) if isinstance(given, str | Path) else tuple(map(str, given))
