"""From text to token shards, streaming: `resmol prepare`.

The path of the text is documents -> pieces -> batches of pieces -> ids -> one of two writers. A batch is encoded on all
cores at once (threads in Rust), and memory holds one. The folder appears whole or not at all (system/atomic_io.py).
What an interrupted preparation did is in a folder beside it (saved_state.py), from which the same call goes on.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from resmol.data.folders import shown_unused
from resmol.data.readers import Corpus
from resmol.data.saved_state import (
    State,
    UnfinishedWork,
    UnusableStateError,
    as_array,
    from_array,
    part_of,
    unfinished_work,
    with_prefix,
)
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
from resmol.data.text_stream import TextStream
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError, UsageError
from resmol.system.atomic_io import commit_staged, full_disk_is_an_error
from resmol.system.wording import counted
from resmol.version import __version__

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far `prepare` is.

    Attributes:
        bytes_done: Bytes read from the inputs.
        bytes_total: Bytes of all inputs; None where nobody knows.
        documents: Documents begun.
        tokens: Tokens written.
        bytes_kept: Bytes that an earlier process had read, when it was interrupted.
    """

    bytes_done: int
    bytes_total: int | None
    documents: int
    tokens: int
    bytes_kept: int = 0


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

    Whatever ends it early, even a kill, costs about half a minute of work: the same call goes on from there, and its
    result is the same, byte for byte. Only what cannot be read twice, such as standard input, begins again.

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
        DiskFull: No room.
        RunInUse: Another process prepares the same folder.
    """
    _require_fresh(out)
    if not 0 <= val_fraction < 1:
        raise UsageError(f"--val-fraction is {val_fraction}", fix="give a share from 0 up to, but not including, 1")
    settings = _Settings(val_fraction, seed, dedup, shard_tokens, max_tokens)
    with unfinished_work(out, _identity(corpus, tokenizer, settings)) as work, full_disk_is_an_error(out):
        _require_fresh(out)  # another process may have finished it
        job = _Job(work, corpus, tokenizer, settings, on_progress)
        with _kept_for_the_next(work, job):
            job.write_files()
        commit_staged(work.data, out, lambda _folder: job.manifest().to_json())
    return open_dataset(out)


@dataclass(frozen=True)
class _Settings:
    """What `prepare` was asked for; see there."""

    val_fraction: float
    seed: int
    dedup: bool
    shard_tokens: int
    max_tokens: int | None


def _identity(corpus: Corpus, tokenizer: Tokenizer, settings: _Settings) -> dict[str, object] | None:
    """Return what the result depends on besides the bytes of the text."""
    if corpus.identity is None:
        return None
    versions = [__version__, importlib.metadata.version("tokenizers")]
    encoder = [tokenizer.sha256, tokenizer.eos_id, tokenizer.document_start, tokenizer.special_tokens_are_text]
    return {**corpus.identity, **asdict(settings), "tokenizer": encoder, "version of resmol or tokenizers": versions}


@contextmanager
def _kept_for_the_next(work: UnfinishedWork, job: _Job) -> Iterator[None]:
    """Say what is kept when an error ends the work."""
    try:
        yield
    except BaseException:
        if work.is_saved:
            logger.info(f"data: the same command goes on after {counted(job.saved_documents, 'document')} "
                        f"(kept in {work.folder})")  # fmt: skip
        raise


@dataclass
class _Job:
    """One run of `prepare`: what it was asked for, and what it has counted so far."""

    work: UnfinishedWork
    corpus: Corpus
    tokenizer: Tokenizer
    settings: _Settings
    on_progress: Callable[[Progress], None] | None
    tokens: int = 0
    saved_documents: int = 0
    bytes_kept: int = 0
    special_tokens: Counter[int] = field(default_factory=Counter)
    splits: dict[str, tuple[Shard, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.token_bytes = token_width(self.tokenizer.vocab_size)
        self.begin()

    def begin(self) -> None:
        """Take the text from its beginning."""
        self.stream = TextStream(
            self.corpus,
            val_fraction=self.settings.val_fraction,
            seed=self.settings.seed,
            dedup=self.settings.dedup,
            count_untokenizable=self.tokenizer.count_untokenizable,
        )
        self.writers = {
            split: SplitWriter(
                self.work.data,
                split,
                token_bytes=self.token_bytes,
                tokenizer=tokenizer_name(self.tokenizer),
                shard_tokens=self.settings.shard_tokens,
            )
            for split in SPLITS
        }

    def write_files(self) -> None:
        """Write all shards, from the beginning or from where another process was."""
        try:
            self._go_on()
            self._write_tokens()
            self._hold_out_something()
            self.splits = {name: writer.finish() for name, writer in self.writers.items()}
        finally:
            self._close()

    def _close(self) -> None:
        for writer in self.writers.values():
            writer.close()

    def _go_on(self) -> None:
        """Go on from the saved state, or begin where there is none that can be used."""
        try:
            state = self.work.load()
            if state is not None:
                self._resume(state)
                logger.info(f"data: going on after {counted(self.saved_documents, 'document')}")
                return
        except UnusableStateError as error:
            logger.info(f"data: what is in {self.work.folder} is of no use ({error}): starting over")
            self._close()
            self.begin()
        self.work.remove()
        self.work.data.mkdir()
        self._report_progress()

    def _resume(self, state: State) -> None:
        logger.info(f"data: comparing what an earlier process left in {self.work.folder}")
        self.saved_documents = from_array(state["documents"])
        for name, writer in self.writers.items():
            writer.resume(part_of(state, name))
        self.stream.resume(part_of(state, "text"))
        self.special_tokens = Counter(dict(from_array(state["special_tokens"])))
        self.bytes_kept = self.stream.counts.bytes_read
        self._count()

    def _save(self) -> None:
        self.saved_documents = self.stream.totals.documents
        state = {
            "documents": as_array(self.saved_documents),
            "special_tokens": as_array(list(self.special_tokens.items())),
        }
        state |= with_prefix("text", self.stream.state())
        for name, writer in self.writers.items():
            state |= with_prefix(name, writer.state())
        self.work.save(state)

    def _is_enough(self) -> bool:
        return self.settings.max_tokens is not None and self.tokens >= self.settings.max_tokens

    def _count(self) -> None:
        self.tokens = sum(writer.tokens for writer in self.writers.values())
        self._report_progress()

    def _write_tokens(self) -> None:
        start = np.array(self.tokenizer.document_start, dtype=np.int64)
        end = np.array([self.tokenizer.eos_id], dtype=np.int64)
        is_special = np.zeros(self.tokenizer.vocab_size, dtype=np.bool_)
        is_special[list(self.tokenizer.special_tokens)] = True
        for batch in self.stream.batches(self._is_enough):
            for piece, ids in zip(batch, self.tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                tokens = np.array(ids, dtype=np.int64)
                writer = self.writers[piece.split]
                if piece.begins and len(start):
                    writer.append(start)
                writer.append(tokens)
                self.special_tokens.update(tokens[is_special[tokens]].tolist())
                if piece.is_left_out:
                    writer.discard_document()
                elif piece.ends:
                    writer.append(end)
                    writer.end_document()
                    self.stream.statistics.add_length(writer.last_document_tokens())
            self._count()
            # A document that may be discarded is not saved half: tokens before the saved place are never touched.
            if self.work.is_due() and not (self.settings.dedup and self.stream.is_within_document):
                self._save()
        if self.stream.totals.documents == 0:
            unused = "".join(f"; not used: {shown_unused(facts)}" for facts in self.stream.counts.unused.facts())
            raise DataError(f"there is no text in {self.corpus.name}{unused}", fix="check that the input is not empty")

    def _hold_out_something(self) -> None:
        train, val, totals = self.writers["train"], self.writers["val"], self.stream.totals
        if totals.held_out == "named":
            self._require_both()
        if totals.held_out in ("named", "documents") or self.settings.val_fraction == 0:
            return
        last = train.last_document_tokens()
        if train.documents > 1 and 2 * last <= train.tokens:
            totals.held_out = "documents"
            val.append(train.take_back(last))
            self.stream.duplicates.hold_out_last()
        else:
            count = min(max(1, round(self.settings.val_fraction * train.tokens)), last - 1)
            if count == 0:
                return  # one document without a single token: nothing to divide
            totals.held_out = "position"
            val.append(train.take_back(count))
        val.end_document()

    def _require_both(self) -> None:
        """Refuse input that names its splits and leaves one of them empty."""
        for split, writer in self.writers.items():
            if writer.documents == 0:
                part = "held-out" if split == "val" else "training"
                raise DataError(
                    f"there is no text in the {part} part of {self.corpus.name}",
                    fix="check its files; where the text does not say what to hold out, a share of it is",
                )

    def _report_progress(self) -> None:
        if self.on_progress is not None:
            done, total = self.stream.counts.bytes_read, self.corpus.bytes_total
            documents = self.stream.totals.documents
            self.on_progress(Progress(done, total, documents, self.tokens, self.bytes_kept))

    def manifest(self) -> Manifest:
        """Return the manifest; only after `write_files`."""
        tokenizer = self.tokenizer
        spelled = {tokenizer.special_tokens[token]: count for token, count in sorted(self.special_tokens.items())}
        return Manifest(
            created_with=f"resmol {__version__}",
            tokenizer=TokenizerFacts(sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id),
            token_bytes=self.token_bytes,
            train=Split.of(self.splits["train"]),
            val=Split.of(self.splits["val"]),
            source=self.stream.facts(special_tokens=spelled, max_tokens=self.settings.max_tokens),
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
