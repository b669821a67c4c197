"""The text of a corpus on its way to the tokenizer: in pieces, each for train or val, counted, without copies to drop.

After any batch another process can go on: it counts and hashes the files that were read to their end, reads the current
one again up to the same piece, and compares the hash of all bytes that it read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Literal

from resmol.data.chunking import ReadCounts
from resmol.data.duplicates import BEGINNING_CHARACTERS, Duplicates
from resmol.data.readers import Corpus, Document
from resmol.data.saved_state import State, UnusableStateError, as_array, from_array, part_of, with_prefix
from resmol.data.source_facts import SourceFacts
from resmol.data.text_statistics import StatisticsCounter

# An encoding takes about 150 bytes a token in Rust: this bounds the memory, whatever the input.
BATCH_BYTES = 1 << 20

HeldOut = Literal["named", "documents", "position", "none"]


def is_held_out(number: int, seed: int, val_fraction: float) -> bool:
    """Return whether document ``number`` (from 0) is held out, by its BLAKE2b keyed with the seed."""
    if number == 0:
        return False  # so that there is always something to train on
    key = f"resmol val {seed}".encode("ascii")[:64]
    digest = hashlib.blake2b(number.to_bytes(8, "little"), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "little") < val_fraction * 2.0**64


@dataclass
class Piece:
    """A piece of text for a split; with its end a document ``ends``, or turns out to be ``left_out``."""

    text: str
    split: str
    begins: bool = False
    ends: bool = False
    is_left_out: bool = False


@dataclass
class Totals:
    """Counts of the text that was passed on; ``held_out`` is how the documents of val were chosen so far."""

    documents: int = 0
    empty_documents: int = 0
    text_bytes: int = 0
    untokenizable_bytes: int = 0
    held_out: HeldOut = "none"


@dataclass
class _RawPiece:
    """A piece as it is read; a document without text is one of them, and empty."""

    document: Document
    text: str
    begins: bool
    ends: bool


class TextStream:
    """The pieces of a corpus, which are read once.

    Args:
        corpus: The documents.
        val_fraction: Share of the documents to hold out where the corpus does not say which.
        seed: Seed of that choice.
        dedup: Leave out exact copies of documents.
        count_untokenizable: Counts the bytes of a text that the tokenizer drops.

    Attributes:
        counts: What was read.
        totals: What was passed on.
        duplicates: Of its documents.
        statistics: Of its text; the lengths of the documents in tokens are for others to add.
        is_within_document: Whether the last batch ended within a document.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        val_fraction: float,
        seed: int,
        dedup: bool,
        count_untokenizable: Callable[[str], int],
    ) -> None:
        self.counts = ReadCounts()
        self.totals = Totals()
        self.duplicates = Duplicates()
        self.statistics = StatisticsCounter()
        self.is_within_document = False
        self._corpus = corpus
        self._val_fraction = val_fraction
        self._seed = seed
        self._dedup = dedup
        self._count_untokenizable = count_untokenizable
        self._raw = self._read()
        self._file = 0  # the one that the newest piece is of; how many pieces of it there were, and characters in them
        self._pieces_of_file = self._characters_of_file = 0
        self._split = ""  # of the current document, and how it begins
        self._beginning = ""

    def batches(self, is_enough: Callable[[], bool]) -> Iterator[list[Piece]]:
        """Yield the pieces in batches of about `BATCH_BYTES`; no document begins once it ``is_enough``."""
        batch: list[Piece] = []
        size = 0
        for piece, encoded in self._distinct(self._pieces(is_enough)):
            batch.append(piece)
            size += len(encoded)
            self.statistics.add(piece.text, encoded)
            self.totals.text_bytes += len(encoded)
            self.totals.untokenizable_bytes += self._count_untokenizable(piece.text)
            self.is_within_document = not piece.ends
            if size >= BATCH_BYTES:  # nothing is read ahead: this is where another process goes on
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def facts(self, **more: object) -> SourceFacts:
        """Return what the manifest records of the text; ``more`` are the fields that only others know."""
        counts, duplicates = self.counts, self.duplicates
        return SourceFacts.model_validate(
            {
                "inputs": tuple(one.facts() for one in counts.inputs),
                **asdict(self.totals),
                "replacements": counts.replacements,
                "replaced_in": tuple(counts.replaced_in),
                "null_texts": counts.null_texts,
                "first_null": counts.first_null,
                "forced_cuts": counts.forced_cuts,
                "unused": counts.unused.facts(),
                "duplicates": duplicates.count,
                "dedup": "exact" if self._dedup else "none",
                "val_in_train": duplicates.val_in_train(),
                "statistics": self.statistics.facts(duplicates.most_frequent()),
                "val_fraction": self._val_fraction,
                "seed": self._seed,
                "sample_seed": self._corpus.sample_seed,
                "reading": self._corpus.reading,
                **more,
            }
        )

    def state(self) -> State:
        """Return where it is after the latest batch, for `resume`."""
        place = [self._file, self._pieces_of_file, self._split, self._beginning, self.is_within_document]
        return {
            "place": as_array(place),
            "read": as_array(self._bytes_and_characters()),
            "counts": as_array([self.counts.findings(), asdict(self.totals)]),
            **with_prefix("duplicates", self.duplicates.state()),
            **with_prefix("statistics", self.statistics.state()),
        }

    def resume(self, state: State) -> None:
        """Go on where another stream of the same corpus was.

        Raises:
            UnusableStateError: The files do not hold what it read.
        """
        self._file, self._pieces_of_file, self._split, self._beginning, self.is_within_document = from_array(
            state["place"]
        )
        self.counts.skipped_files = max(0, self._file - 1)
        for raw in islice(self._raw, self._pieces_of_file):
            self._characters_of_file += len(raw.text)
            if raw.begins:
                self.duplicates.begin_document()
            self.duplicates.add(raw.text.encode("utf-8"))
        if not self.is_within_document:
            self.duplicates.begin_document()
        if self._bytes_and_characters() != from_array(state["read"]):
            raise UnusableStateError("the text has changed")
        findings, totals = from_array(state["counts"])
        self.counts.restore_findings(findings)
        self.totals = Totals(**totals)
        self.duplicates.restore(part_of(state, "duplicates"))
        self.statistics.restore(part_of(state, "statistics"))

    def _bytes_and_characters(self) -> list[object]:
        """Return the number and the hash of the bytes that were read, by input, and the characters of this file."""
        return [self._characters_of_file, *(one.facts().model_dump(mode="json") for one in self.counts.inputs)]

    def _read(self) -> Iterator[_RawPiece]:
        for document in self._corpus.read(self.counts):
            text, begins = next(document.pieces, ""), True
            for following in document.pieces:
                yield _RawPiece(document, text, begins, ends=False)
                text, begins = following, False
            yield _RawPiece(document, text, begins, ends=True)

    def _pieces(self, is_enough: Callable[[], bool]) -> Iterator[Piece]:
        """Yield the pieces of all documents that are not empty; the last piece of each says so."""
        for raw in self._raw:
            if self.counts.files != self._file:
                self._file, self._pieces_of_file, self._characters_of_file = self.counts.files, 0, 0
            self._pieces_of_file += 1
            self._characters_of_file += len(raw.text)
            if raw.begins and is_enough():
                return
            if not raw.text:
                self.totals.empty_documents += 1
                continue
            if raw.begins:
                self._split = self._split_of(raw.document)
                self.totals.documents += 1
            yield Piece(raw.text, self._split, raw.begins, raw.ends)

    def _distinct(self, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, bytes]]:
        """Yield the pieces with their UTF-8, without copies to leave out; of a long one the last piece says so."""
        for piece in pieces:
            encoded = piece.text.encode("utf-8")
            self.duplicates.add(encoded)
            if piece.begins:
                self._beginning = piece.text[:BEGINNING_CHARACTERS]
            if piece.ends:
                is_copy = self.duplicates.end_document(piece.split, self._beginning, keep_copies=not self._dedup)
                piece.is_left_out = is_copy and self._dedup
                self.totals.documents -= piece.is_left_out
            if not (piece.begins and piece.is_left_out):
                yield piece, encoded

    def _split_of(self, document: Document) -> str:
        if document.split is not None:
            self.totals.held_out = "named"
            return document.split
        is_val = is_held_out(self.totals.documents, self._seed, self._val_fraction)
        if is_val:
            self.totals.held_out = "documents"
        return "val" if is_val else "train"
