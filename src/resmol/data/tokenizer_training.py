"""Make a tokenizer from text: byte-level BPE that cuts text into words as SmolLM2's does, by the tokenizers library.

The text is read as `prepare` reads it, in pieces that end where a word does, and only the counts of the words are kept.
The same text and the same size give the same file. Unlike SmolLM2's, every byte has a token, so any text comes back
whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from resmol.data.byte_level import MAX_ID, byte_alphabet
from resmol.data.chunking import ReadCounts
from resmol.data.readers import Corpus
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError, UsageError
from resmol.system.atomic_io import commit_directory
from resmol.system.progress import TICK_SECONDS, Background, byte_progress
from resmol.version import __version__

logger = logging.getLogger(__name__)

END = "<|endoftext|>"
SMALLEST = 1 + len(byte_alphabet())  # the end and every byte: nothing is merged
MIN_FREQUENCY = 2  # what stands in a text once is no pattern
TOKENIZER = "tokenizer.json"
WAITING_PIECES = 64  # of at most 256 Ki characters
LEAVE_SECONDS = 2.0


@dataclass
class TrainingFacts:
    """What a tokenizer was made from; filled while the text is read.

    Attributes:
        counts: What reading found.
        documents: Documents with text that were used; what is held out is not.
        text_bytes: Their UTF-8 bytes.
        abandoned: Nobody waits for the result any more.
    """

    counts: ReadCounts = field(default_factory=ReadCounts)
    documents: int = 0
    text_bytes: int = 0
    abandoned: bool = False


def train_tokenizer(out: Path, corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on a corpus, write it into the folder ``out``, and show the progress.

    The vocabulary is the end of a document (id 0), the 256 bytes, and the merges in the order in which byte pair
    encoding finds them (Sennrich et al. 2016): each joins the pair that is most frequent in the words so far.

    Args:
        out: A folder that does not exist yet. It gets ``tokenizer.json``, ``tokenizer_config.json`` for transformers,
            and ``manifest.json``, which says what it was made from.
        corpus: The text; documents that it holds out are left out.
        vocab_size: Entries of the vocabulary.

    Raises:
        UsageError: ``out`` exists, or no vocabulary has this size.
        DataError: The corpus cannot be read, holds no text, or yields a smaller vocabulary.
        DiskFull: No room; nothing is left behind.
    """
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists already", fix="name a folder that does not exist yet, or remove it first")
    if not SMALLEST <= vocab_size <= MAX_ID:
        raise UsageError(
            f"--vocab-size is {vocab_size:,}",
            fix=f"give a number from {SMALLEST} (all bytes and the end) to {MAX_ID:,}",
        )
    facts = TrainingFacts()
    rust = _trained(corpus, vocab_size, facts)
    if facts.documents == 0:
        raise DataError(f"there is no text in {corpus.name}", fix="check that the input is not empty")
    if rust.get_vocab_size() < vocab_size:
        raise DataError(
            f"{corpus.name} ({facts.text_bytes:,} bytes) yields {rust.get_vocab_size():,} entries, and {vocab_size:,} "
            "are asked for",
            fix=f"give --vocab-size {rust.get_vocab_size()} or less, or more text",
        )
    data = rust.to_str(pretty=True).encode("utf-8")
    tokenizer = Tokenizer(data, out / TOKENIZER)
    out.parent.mkdir(parents=True, exist_ok=True)
    commit_directory(out, lambda folder: _write(folder, data), lambda _: _manifest(tokenizer, facts))
    logger.info(f"tokenizer: {vocab_size:,} entries from {facts.text_bytes:,} bytes of text, in {out}")
    return tokenizer


def _trained(corpus: Corpus, vocab_size: int, facts: TrainingFacts) -> tokenizers.Tokenizer:
    """Return the library's tokenizer, trained in the background on what is read here."""
    rust = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    rust.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    rust.decoder = decoders.ByteLevel()
    pieces: Queue[str | None] = Queue(WAITING_PIECES)
    training = Background(lambda: rust.train_from_iterator(_taken(pieces, facts), _trainer(vocab_size)))
    with byte_progress("tokenizer") as advance:
        try:
            for piece in chain(_used_pieces(corpus, facts), (None,)):
                while training.is_alive:  # else it failed, and nobody takes the pieces
                    with suppress(Full):
                        pieces.put(piece, timeout=TICK_SECONDS)
                        break
                advance(facts.counts.bytes_read, corpus.bytes_total, "")
            training.wait(lambda: advance(facts.counts.bytes_read, corpus.bytes_total, "finding merges"))
        except BaseException:
            facts.abandoned = True
            training.leave(LEAVE_SECONDS)
            raise
    return rust


def _used_pieces(corpus: Corpus, facts: TrainingFacts) -> Iterator[str]:
    for document in corpus.read(facts.counts):
        begun = False
        for piece in document.pieces:
            if document.split != "val":
                facts.documents += not begun
                facts.text_bytes += len(piece.encode("utf-8"))
                begun = True
                yield piece


def _taken(pieces: Queue[str | None], facts: TrainingFacts) -> Iterator[str]:
    """Yield the pieces until None comes (`InterruptedError` when nobody waits any more)."""
    while not facts.abandoned:
        with suppress(Empty):
            if (piece := pieces.get(timeout=TICK_SECONDS)) is None:
                return
            yield piece
    raise InterruptedError


def _trainer(vocab_size: int) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[END],
        initial_alphabet=sorted(byte_alphabet().values()),
        show_progress=False,
    )


def _write(folder: Path, data: bytes) -> None:
    (folder / TOKENIZER).write_bytes(data)
    table = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (folder / "tokenizer_config.json").write_bytes(_json(table))


def _manifest(tokenizer: Tokenizer, facts: TrainingFacts) -> bytes:
    return _json(
        {
            "format": "resmol-tokenizer",
            "created_with": f"resmol {__version__}, tokenizers {tokenizers.__version__}",
            "sha256": hashlib.sha256(tokenizer.data).hexdigest(),
            "vocab_size": tokenizer.vocab_size,
            "min_frequency": MIN_FREQUENCY,
            "documents": facts.documents,
            "text_bytes": facts.text_bytes,
            "inputs": [one.facts().model_dump(mode="json") for one in facts.counts.inputs],
        }
    )


def _json(table: dict[str, Any]) -> bytes:
    return (json.dumps(table, indent=2) + "\n").encode("utf-8")
