"""`resmol bench prepare`: text to tokens by resmol, from files of each format, and by the bare tokenizers library."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from resmol.bench.comparison import Comparison, Quantity, Variant
from resmol.bench.machine import machine_facts
from resmol.bench.subprocess_runs import run_worker
from resmol.bench.text_formats import FORMATS
from resmol.bench.workers.main import Metrics
from resmol.data.chunking import ReadCounts
from resmol.data.readers import Corpus
from resmol.data.resolve import Text
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError, UsageError

DOCUMENT_CHARACTERS = 4000
BASELINE_FORMAT = "jsonl"  # which the bare library reads
SPEED = Quantity("megabytes_per_second", "MB/s", ".2f")
MEMORY = Quantity("bytes_above_base", "peak memory above base, MB", unit=1e6)
TOKENS = Quantity("tokens", "tokens")

_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class PrepareBench:
    """What to compare.

    Attributes:
        text: The corpus to repeat.
        size: Bytes of the repeated text.
        formats: Names in `FORMATS`.
        threads: Threads of the tokenizers library; 0 takes all cores.
        repeats: Rounds.
    """

    text: Text
    size: int = 20_000_000
    formats: tuple[str, ...] = (BASELINE_FORMAT,)
    threads: int = 0
    repeats: int = 5

    def __post_init__(self) -> None:
        for name, value, least in (("repeats", self.repeats, 1), ("workers", self.threads, 0)):
            if value < least:
                raise UsageError(f"--{name} is {value}", fix=f"give at least {least}")
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown:
            raise UsageError(f"--format is {unknown[0]!r}", fix=f"choose from: all, {', '.join(FORMATS)}")


def parse_size(text: str) -> int:
    """Return a number of bytes such as ``20MB`` or ``1GB`` (`UsageError` for anything else)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMG]B)", text.strip())
    if found is None:
        raise UsageError(f"--size is {text!r}", fix="give a size, such as 20MB or 1GB")
    return round(float(found[1]) * _UNITS[found[2]])


def preparation_comparison(bench: PrepareBench, tokenizer: Tokenizer, folder: Path) -> Comparison:
    """Return the comparison, ready to run; it writes its files to ``folder`` when it needs them.

    Raises:
        DataError: The corpus holds no text.
    """
    files = TextFiles(bench.text.open(), bench.size, folder)
    saved, out = folder / "tokenizer.json", folder / "out"
    saved.write_bytes(tokenizer.data)
    environment = {"RAYON_NUM_THREADS": str(bench.threads)} if bench.threads else {}

    def once(worker: str, form: str, *, tuned: bool = False) -> Metrics:
        task = {"text": str(files.written(form)), "text_bytes": files.text_bytes, "tokenizer": str(saved),
                "sha256": tokenizer.sha256, "out": str(out), "tuned": tuned}  # fmt: skip
        try:
            return run_worker(f"resmol.bench.workers.{worker}", task, folder, environment)
        finally:
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)

    def bare(*, tuned: bool = False) -> Metrics:
        return once("prepare_tokenizers", BASELINE_FORMAT, tuned=tuned)

    rows = [
        Variant("tokenizers", "reference", bare),
        Variant("control: tokenizers again", "control", bare),
        Variant("tokenizers, tuned, ids discarded", "other", lambda: bare(tuned=True)),
        *(Variant(f"resmol, {form}", "other", partial(once, "prepare", form)) for form in bench.formats),
    ]
    return Comparison(
        title=f"preparing {files.text_bytes / 1e6:,.0f} MB in documents of {DOCUMENT_CHARACTERS:,} characters",
        metric=SPEED,
        columns=(MEMORY, TOKENS),
        variants=rows,
        facts={**machine_facts(0), "threads": bench.threads or os.cpu_count(), "text_bytes": files.text_bytes},
        inverted=True,
        notes=lambda _comparison: [
            "The text repeats a corpus, so the library's cache has more hits than usual, in all rows alike. Base is "
            "the process with its imports and the tokenizer."
        ],
    )


class TextFiles:
    """A corpus, repeated to a size, as files of any format.

    Attributes:
        text_bytes: Bytes of its text.
    """

    def __init__(self, corpus: Corpus, size: int, folder: Path) -> None:
        """Count the text (`DataError` where there is none)."""
        self._corpus = corpus
        self._size = size
        self._folder = folder
        self.text_bytes = sum(len(text.encode("utf-8")) for text in self.documents())

    def documents(self) -> Iterator[str]:
        """Yield the documents."""
        written = 0
        while written < self._size:
            before = written
            for text in _documents(self._corpus):
                yield text
                written += len(text.encode("utf-8"))
                if written >= self._size:
                    return
            if written == before:
                raise DataError(f"there is no text in {self._corpus.name}", fix="check that the input is not empty")

    def written(self, form: str) -> Path:
        """Return the file of a format, written now if it is not there yet."""
        ending, write = FORMATS[form]
        path = self._folder / f"{form.partition('.')[0]}{ending}"
        if not path.exists():
            write(self.documents(), path)
        return path


def _documents(corpus: Corpus) -> Iterator[str]:
    for document in corpus.read(ReadCounts()):
        for piece in document.pieces:
            for start in range(0, len(piece), DOCUMENT_CHARACTERS):
                yield piece[start : start + DOCUMENT_CHARACTERS]
