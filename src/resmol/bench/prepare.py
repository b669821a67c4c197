"""`resmol bench prepare`: text to tokens by resmol and by the bare tokenizers library, and the memory it takes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from resmol.bench.comparison import MEMORY, Comparison, Quantity, make_variants
from resmol.bench.machine import machine_facts
from resmol.bench.subprocess_runs import run_worker
from resmol.bench.workers.main import Metrics
from resmol.data.chunking import ReadCounts
from resmol.data.readers import Corpus
from resmol.data.resolve import Text
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError, UsageError
from resmol.system.wording import counted

DOCUMENT_CHARACTERS = 4000
SPEED = Quantity("megabytes_per_second", "MB/s", ".2f")
TOKENS = Quantity("tokens", "tokens")


@dataclass(frozen=True)
class PrepareBench:
    """What to compare.

    Attributes:
        text: The corpus to repeat.
        megabytes: Size of the repeated text in millions of bytes.
        threads: Threads of the tokenizers library; 0 takes all cores.
        repeats: Rounds.
    """

    text: Text
    megabytes: int = 20
    threads: int = 0
    repeats: int = 5

    def __post_init__(self) -> None:
        for name, value, least in (
            ("megabytes", self.megabytes, 1), ("repeats", self.repeats, 1), ("workers", self.threads, 0),
        ):  # fmt: skip
            if value < least:
                raise UsageError(f"--{name} is {value}", fix=f"give at least {least}")


def preparation_comparison(bench: PrepareBench, tokenizer: Tokenizer, folder: Path) -> Comparison:
    """Write the text to ``folder`` and return the comparison, ready to run."""
    text, out = folder / "text.jsonl", folder / "out"
    size, documents = write_text(bench.text.open(), text, bench.megabytes * 1_000_000)
    saved = folder / "tokenizer.json"
    saved.write_bytes(tokenizer.data)
    environment = {"RAYON_NUM_THREADS": str(bench.threads)} if bench.threads else {}
    task = {"text": str(text), "text_bytes": size, "tokenizer": str(saved), "sha256": tokenizer.sha256, "out": str(out)}

    def once(worker: str, *, tuned: bool = False) -> Metrics:
        try:
            return run_worker(f"resmol.bench.workers.{worker}", {**task, "tuned": tuned}, folder, environment)
        finally:
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)

    return Comparison(
        title=f"preparing {size / 1e6:,.0f} MB in {counted(documents, 'document')}",
        metric=SPEED,
        columns=(MEMORY, TOKENS),
        variants=make_variants(
            lambda: once("prepare"),
            {
                "tokenizers": lambda: once("prepare_tokenizers"),
                "tokenizers, tuned, ids discarded": lambda: once("prepare_tokenizers", tuned=True),
            },
        ),
        facts={**machine_facts(0), "threads": bench.threads or os.cpu_count(), "text_bytes": size},
        notes=lambda _comparison: [
            "The text repeats a corpus, so the library's cache has more hits than usual, in all rows alike."
        ],
    )


def write_text(corpus: Corpus, path: Path, size: int) -> tuple[int, int]:
    """Write a corpus repeatedly as JSON lines until ``size`` bytes of text are reached, a piece at a time.

    Returns:
        The numbers of bytes of text and of documents that were written.

    Raises:
        DataError: The corpus holds no text.
    """
    written = documents = 0
    with path.open("w", encoding="utf-8", newline="\n") as out:
        while written < size:
            before = written
            for text in _documents(corpus):
                out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written, documents = written + len(text.encode("utf-8")), documents + 1
                if written >= size:
                    break
            if written == before:
                raise DataError(f"there is no text in {corpus.name}", fix="check that the input is not empty")
    return written, documents


def _documents(corpus: Corpus) -> Iterator[str]:
    for document in corpus.read(ReadCounts()):
        for piece in document.pieces:
            for start in range(0, len(piece), DOCUMENT_CHARACTERS):
                yield piece[start : start + DOCUMENT_CHARACTERS]
