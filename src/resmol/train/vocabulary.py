"""Fit the vocabulary of a model to its tokenizer: the number of rows, and the ids that end and begin a text."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from resmol.config.run_config import RunConfig
from resmol.data.tokenizer import Tokenizer
from resmol.data.tokenizer_files import SMOLLM2_TOKENIZER_SHA256, SMOLLM2_VOCAB_SIZE
from resmol.errors import ConfigError
from resmol.model.flops import total_parameters

logger = logging.getLogger(__name__)

# GPUs multiply matrices in tiles, and a last tile that is partly empty costs as much as a full one; SmolLM2's
# vocabulary is a multiple too. At most 63 rows belong to no token.
ROWS_MULTIPLE = 64


@dataclass(frozen=True)
class Vocabulary:
    """What a configuration states of a tokenizer.

    Attributes:
        sha256: The hash of its ``tokenizer.json``.
        entries: Its largest id + 1.
        rows: ``model.vocab_size``, V.
        bos_id: The id that begins a text.
        eos_id: The id that ends a document.
    """

    sha256: str
    entries: int
    rows: int
    bos_id: int
    eos_id: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """Return what fits a tokenizer; in training a text follows the end of another one, so that id begins it."""
        entries, end = tokenizer.vocab_size, tokenizer.eos_id
        return cls(tokenizer.sha256, entries, fitting_rows(entries), bos_id=end, eos_id=end)

    @classmethod
    def stated_by(cls, config: RunConfig) -> Vocabulary:
        """Return what a configuration states."""
        model, rows = config.model, config.model.vocab_size
        return cls(config.tokenizer.sha256, rows, rows, model.bos_token_id, model.eos_token_id)


def fitting_rows(entries: int) -> int:
    """Return the rows of an embedding for so many entries."""
    return -(-entries // ROWS_MULTIPLE) * ROWS_MULTIPLE


def with_vocabulary(config: RunConfig, vocabulary: Vocabulary, stated: Collection[str] = ()) -> RunConfig:
    """Return the configuration for another tokenizer than SmolLM2's, which every preset has.

    All that belongs to SmolLM2's tokenizer goes with it. A ``model.vocab_size`` that is not SmolLM2's was chosen by the
    user and stays.

    Args:
        config: The configuration that is asked for.
        vocabulary: What it gets.
        stated: The ``section.key`` names that the user set beside it; these stay too.

    Raises:
        ConfigError: The configuration asks for a third tokenizer, or has too few rows for this one.
    """
    if config.tokenizer.sha256 == vocabulary.sha256 and "tokenizer.sha256" not in stated:
        return config
    is_free = config.tokenizer.sha256 == SMOLLM2_TOKENIZER_SHA256 and "tokenizer.sha256" not in stated
    if config.tokenizer.sha256 != vocabulary.sha256 and not is_free:
        raise ConfigError(
            f"the tokenizer has sha256 {vocabulary.sha256}; the configuration asks for {config.tokenizer.sha256}",
            fix="name the other file with --tokenizer PATH, or take tokenizer.sha256 out of the configuration",
        )
    changes = {
        "tokenizer.sha256": vocabulary.sha256,
        "model.vocab_size": vocabulary.rows,
        "model.bos_token_id": vocabulary.bos_id,
        "model.eos_token_id": vocabulary.eos_id,
    }
    if config.model.vocab_size != SMOLLM2_VOCAB_SIZE:
        del changes["model.vocab_size"]
        _require_rows(config, vocabulary.entries)
    return config.replace({key: value for key, value in changes.items() if key not in stated})


def check_vocabulary(config: RunConfig, entries: int, eos_id: int) -> None:
    """Refuse a tokenizer that does not fit the model.

    Args:
        config: The configuration of the run.
        entries: The tokenizer's largest id + 1.
        eos_id: The token with which it ends a document.

    Raises:
        ConfigError: The model has too few rows, or another end.
    """
    _require_rows(config, entries)
    if eos_id != config.model.eos_token_id:
        raise ConfigError(
            f"the tokenizer ends documents with {eos_id}, and model.eos_token_id is {config.model.eos_token_id}",
            fix=f"start a new run with --set model.eos_token_id={eos_id}",
        )


def _require_rows(config: RunConfig, entries: int) -> None:
    if entries > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {entries:,} entries, and model.vocab_size is {config.model.vocab_size:,}",
            fix=f"start a new run with --set model.vocab_size={fitting_rows(entries)}",
        )


def log_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Log which tokenizer a new run has, if not SmolLM2's, and what its size makes of the model."""
    model, entries = config.model, tokenizer.vocab_size
    if tokenizer.sha256 != SMOLLM2_TOKENIZER_SHA256:
        logger.info(
            f"tokenizer: {entries:,} entries (sha256 {tokenizer.sha256[:12]}); model.vocab_size is {model.vocab_size:,}"
            f", and {tokenizer.spelling(tokenizer.eos_id)} (id {tokenizer.eos_id}) ends a document"
        )
    if model.vocab_size <= 2 * entries:
        return
    matrices = 1 if model.tie_word_embeddings else 2
    share = matrices * (model.vocab_size - entries) * model.hidden_size / total_parameters(model)
    logger.warning(
        f"the tokenizer has {entries:,} entries and the model {model.vocab_size:,}: {share:.0%} of the parameters "
        f"belong to ids that never occur; a new run with --set model.vocab_size={Vocabulary.of(tokenizer).rows} has "
        "none of them"
    )
