"""From text to token shards, streaming: `resmol prepare`.

The path of the text is documents -> pieces -> batches of pieces -> ids -> one of two writers. A batch is encoded on all
cores at once (threads in Rust), and memory holds one. The folder appears whole or not at all (system/atomic_io.py).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from resmol.data.chunking import ReadCounts
from resmol.data.duplicates import BEGINNING_CHARACTERS, Duplicates
from resmol.data.folders import shown_unused
from resmol.data.readers import Corpus, Document
from resmol.data.shard_writer import SplitWriter, tokenizer_name
from resmol.data.shards import (
    MANIFEST,
    SPLITS,
    Dataset,
    Manifest,
    Shard,
    Split,
    TokenizerFacts,
    open_dataset,
    token_width,
)
from resmol.data.source_facts import SourceFacts
from resmol.data.text_statistics import StatisticsCounter
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError, UsageError
from resmol.system.atomic_io import commit_directory
from resmol.version import __version__

# An encoding takes about 150 bytes a token in Rust: this bounds the memory, whatever the input.
BATCH_BYTES = 1 << 20

HeldOut = Literal["named", "documents", "position", "none"]


@dataclass(frozen=True)
class Progress:
    """How far `prepare` is.

    Attributes:
        bytes_done: Bytes read from the inputs.
        bytes_total: Bytes of all inputs; None where nobody knows.
        documents: Documents begun.
        tokens: Tokens written.
    """

    bytes_done: int
    bytes_total: int | None
    documents: int
    tokens: int


def prepare(
    out: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    val_fraction: float = 0.01,
    seed: int = 0,
    dedup: bool = False,
    shard_tokens: int = 100_000_000,
    max_tokens: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Dataset:
    """Tokenise a corpus into the folder ``out``: every token once, in the order of the documents.

    A document goes to train or val as a whole: where the corpus says so, else by a hash of (seed, its
    number among the documents with text); the first one always trains. If the hash held out nothing, the last
    document is held out; if that is more than half of all tokens (a single file), only the last
    ``val_fraction`` of the tokens are, by position.

    Args:
        out: A folder that does not exist yet, or is empty.
        corpus: The documents.
        tokenizer: Its end-of-document token is appended to each document; nothing comes before one, except for text
            that a model from elsewhere is evaluated on (`Tokenizer.document_start`).
        val_fraction: Share of the documents to hold out, in [0, 1); 0 holds out nothing.
        seed: Seed of that choice.
        dedup: Leave out each document that is an exact copy of an earlier one. What remains is what preparing the
            corpus without the copies gives.
        shard_tokens: A new shard begins at the first document end after this many tokens.
        max_tokens: No document begins once so many tokens are written; about 1 MB of text may be on its way then.
        on_progress: Called at the beginning, after each MB and at the end.

    Returns:
        The prepared folder, opened.

    Raises:
        UsageError: ``out`` exists and is not empty, or ``val_fraction`` is outside [0, 1).
        DataError: The corpus holds no text, or cannot be read.
        DiskFull: No room; nothing is left behind.
    """
    _require_fresh(out)
    if not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction is {val_fraction}", fix="give a share from 0 up to, but not including, 1")
    out.parent.mkdir(parents=True, exist_ok=True)
    job = _Job(corpus, tokenizer, val_fraction, seed, dedup, shard_tokens, max_tokens, on_progress)
    commit_directory(out, job.write_files, lambda _folder: job.manifest().to_json())
    return open_dataset(out)


def is_held_out(number: int, seed: int, val_fraction: float) -> bool:
    """Return whether document ``number`` (from 0) is held out, by its BLAKE2b keyed with the seed."""
    if number == 0:
        return False  # so that there is always something to train on
    key = f"resmol val {seed}".encode("ascii")[:64]
    digest = hashlib.blake2b(number.to_bytes(8, "little"), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2.0**64


@dataclass
class _Item:
    """A piece of text on its way to a writer; with its end a document ``ends``, or turns out to be ``left_out``."""

    text: str
    split: str
    begins: bool = False
    ends: bool = False
    is_left_out: bool = False


@dataclass
class _Totals:
    documents: int = 0
    empty_documents: int = 0
    text_bytes: int = 0
    untokenizable_bytes: int = 0
    special_tokens: Counter[int] = field(default_factory=Counter)
    held_out: HeldOut = "none"


@dataclass
class _Job:
    """One run of `prepare`: what it was asked for, and what it has counted so far."""

    corpus: Corpus
    tokenizer: Tokenizer
    val_fraction: float
    seed: int
    dedup: bool
    shard_tokens: int
    max_tokens: int | None
    on_progress: Callable[[Progress], None] | None
    tokens: int = 0
    counts: ReadCounts = field(default_factory=ReadCounts)
    totals: _Totals = field(default_factory=_Totals)
    duplicates: Duplicates = field(default_factory=Duplicates)
    statistics: StatisticsCounter = field(default_factory=StatisticsCounter)
    splits: dict[str, tuple[Shard, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.token_bytes = token_width(self.tokenizer.vocab_size)

    def write_files(self, folder: Path) -> None:
        """Write all shards below ``folder``."""
        name_in_metadata = tokenizer_name(self.tokenizer)
        writers = {
            split: SplitWriter(
                folder,
                split,
                token_bytes=self.token_bytes,
                tokenizer=name_in_metadata,
                shard_tokens=self.shard_tokens,
            )
            for split in SPLITS
        }
        try:
            self._write_tokens(writers)
            self._hold_out_something(writers)
            self.splits = {name: writer.finish() for name, writer in writers.items()}
        finally:
            for writer in writers.values():
                writer.close()

    def _write_tokens(self, writers: dict[str, SplitWriter]) -> None:
        start = np.array(self.tokenizer.document_start, dtype=np.int64)
        end = np.array([self.tokenizer.eos_id], dtype=np.int64)
        is_special = np.zeros(self.tokenizer.vocab_size, dtype=np.bool_)
        is_special[list(self.tokenizer.special_tokens)] = True
        self._report_progress()
        for batch in self._batches():
            for item, ids in zip(batch, self.tokenizer.encode_batch([item.text for item in batch]), strict=True):
                tokens = np.array(ids, dtype=np.int64)
                writer = writers[item.split]
                if item.begins and len(start):
                    writer.append(start)
                writer.append(tokens)
                self.totals.special_tokens.update(tokens[is_special[tokens]].tolist())
                if item.is_left_out:
                    writer.discard_document()
                elif item.ends:
                    writer.append(end)
                    writer.end_document()
                    self.statistics.add_length(writer.last_document_tokens())
            self.tokens = sum(writer.tokens for writer in writers.values())
            self._report_progress()
        if self.totals.documents == 0:
            unused = "".join(f"; not used: {shown_unused(facts)}" for facts in self.counts.unused.facts())
            raise DataError(f"there is no text in {self.corpus.name}{unused}", fix="check that the input is not empty")

    def _batches(self) -> Iterator[list[_Item]]:
        batch: list[_Item] = []
        size = 0
        for item, encoded in self._distinct(self._items()):
            if batch and size + len(encoded) > BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(item)
            size += len(encoded)
            self.statistics.add(item.text, encoded)
            self.totals.text_bytes += len(encoded)
            self.totals.untokenizable_bytes += self.tokenizer.count_untokenizable(item.text)
        if batch:
            yield batch

    def _distinct(self, items: Iterator[_Item]) -> Iterator[tuple[_Item, bytes]]:
        """Yield the pieces with their UTF-8, without copies to leave out; of a long one the last piece says so."""
        beginning = ""
        for item in items:
            encoded = item.text.encode("utf-8")
            self.duplicates.add(encoded)
            if item.begins:
                beginning = item.text[:BEGINNING_CHARACTERS]
            if item.ends:
                is_copy = self.duplicates.end_document(item.split, beginning, keep_copies=not self.dedup)
                item.is_left_out = is_copy and self.dedup
                self.totals.documents -= item.is_left_out
            if not (item.begins and item.is_left_out):
                yield item, encoded

    def _items(self) -> Iterator[_Item]:
        """Yield the pieces of all documents that are not empty; the last piece of each says so."""
        for document in self.corpus.read(self.counts):
            if self.max_tokens is not None and self.tokens >= self.max_tokens:
                return
            piece = next(document.pieces, None)
            if piece is None:
                self.totals.empty_documents += 1
                continue
            split = self._split_of(document)
            self.totals.documents += 1
            begins = True
            for following in document.pieces:
                yield _Item(piece, split, begins)
                piece, begins = following, False
            yield _Item(piece, split, begins, ends=True)

    def _split_of(self, document: Document) -> str:
        if document.split is not None:
            self.totals.held_out = "named"
            return document.split
        is_val = is_held_out(self.totals.documents, self.seed, self.val_fraction)
        if is_val:
            self.totals.held_out = "documents"
        return "val" if is_val else "train"

    def _hold_out_something(self, writers: dict[str, SplitWriter]) -> None:
        train, val = writers["train"], writers["val"]
        if self.totals.held_out == "named":
            self._require_both(writers)
        if self.totals.held_out in ("named", "documents") or self.val_fraction == 0:
            return
        last = train.last_document_tokens()
        if train.documents > 1 and 2 * last <= train.tokens:
            self.totals.held_out = "documents"
            val.append(train.take_back(last))
            self.duplicates.hold_out_last()
        else:
            count = min(max(1, round(self.val_fraction * train.tokens)), last - 1)
            if count == 0:
                return  # one document without a single token: nothing to divide
            self.totals.held_out = "position"
            val.append(train.take_back(count))
        val.end_document()

    def _require_both(self, writers: dict[str, SplitWriter]) -> None:
        """Refuse input that names its splits and leaves one of them empty."""
        for split, writer in writers.items():
            if writer.documents == 0:
                part = "held-out" if split == "val" else "training"
                raise DataError(
                    f"there is no text in the {part} part of {self.corpus.name}",
                    fix="check its files; where the text does not say what to hold out, a share of it is",
                )

    def _report_progress(self) -> None:
        if self.on_progress is not None:
            done, total = self.counts.bytes_read, self.corpus.bytes_total
            self.on_progress(Progress(done, total, self.totals.documents, self.tokens))

    def manifest(self) -> Manifest:
        """Return the manifest; only after `write_files`."""
        tokenizer, totals = self.tokenizer, self.totals
        return Manifest(
            created_with=f"resmol {__version__}",
            tokenizer=TokenizerFacts(sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id),
            token_bytes=self.token_bytes,
            train=Split.of(self.splits["train"]),
            val=Split.of(self.splits["val"]),
            source=SourceFacts(
                inputs=tuple(one.facts() for one in self.counts.inputs),
                documents=totals.documents,
                empty_documents=totals.empty_documents,
                text_bytes=totals.text_bytes,
                replacements=self.counts.replacements,
                replaced_in=tuple(self.counts.replaced_in),
                null_texts=self.counts.null_texts,
                first_null=self.counts.first_null,
                untokenizable_bytes=totals.untokenizable_bytes,
                forced_cuts=self.counts.forced_cuts,
                special_tokens={
                    tokenizer.special_tokens[token]: count for token, count in sorted(totals.special_tokens.items())
                },
                duplicates=self.duplicates.count,
                dedup="exact" if self.dedup else "none",
                val_in_train=self.duplicates.val_in_train(),
                statistics=self.statistics.facts(self.duplicates.most_frequent()),
                unused=self.counts.unused.facts(),
                held_out=totals.held_out,
                val_fraction=self.val_fraction,
                seed=self.seed,
                max_tokens=self.max_tokens,
                sample_seed=self.corpus.sample_seed,
                reading=self.corpus.reading,
            ),
        )


def _require_fresh(out: Path) -> None:
    if (out / MANIFEST).exists():
        raise UsageError(
            f"{out} is a prepared data folder already",
            fix=f"train on it as it is (--data {out}), name another folder, or remove it first",
        )
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UsageError(f"{out} exists and is not an empty folder", fix="name a folder that does not exist yet")
    if os.path.ismount(out):  # pathlib's does not work on Windows before Python 3.12
        raise UsageError(f"{out} is a mount point, which cannot appear at once", fix=f"name a folder in it: {out}/data")
