"""Where the tokens of a run come from: a prepared folder, or text that is prepared on the fly."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from resmol.data.builtin_corpora import named_corpus
from resmol.data.datatrove import import_datatrove, is_token_folder
from resmol.data.prepare import Progress, log_summary, prepare
from resmol.data.readers import Corpus, read_inputs
from resmol.data.shards import MANIFEST, Dataset, open_dataset
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError, UsageError
from resmol.system.atomic_io import file_sha256
from resmol.system.progress import byte_progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """Which text to prepare, and how.

    Attributes:
        inputs: Files, folders, or ``-``.
        corpus: The name of a corpus; exclusive with ``inputs``.
        val_fraction: Share of the documents that is held out.
        text_field: The field of a jsonl line that holds the text.
    """

    inputs: tuple[str, ...] = ()
    corpus: str | None = None
    val_fraction: float = 0.01
    text_field: str = "text"

    def open(self) -> Corpus:
        """Return the documents (`UsageError` unless exactly one of inputs and corpus is given)."""
        if bool(self.inputs) == (self.corpus is not None):
            raise UsageError("give either --input or --corpus", fix="e.g. --input input.txt, or --corpus shakespeare")
        if self.corpus is not None:
            return named_corpus(self.corpus)
        return read_inputs(self.inputs, text_field=self.text_field)


def prepare_text(out: Path, text: Text, tokenizer: Tokenizer) -> Dataset:
    """Prepare text into the folder ``out`` and show the progress on a terminal; raises what `prepare` raises."""
    if any(is_token_folder(Path(path)) for path in text.inputs):
        return _adopt(out, text, tokenizer)
    corpus = text.open()
    with byte_progress("preparing") as advance:

        def show(progress: Progress) -> None:
            advance(progress.bytes_done, progress.bytes_total, f"{progress.tokens:,} tokens")

        dataset = prepare(out, corpus, tokenizer, val_fraction=text.val_fraction, on_progress=show)
    log_summary(dataset)  # after the bar is gone, so that the two do not write over each other
    return dataset


def _adopt(out: Path, text: Text, tokenizer: Tokenizer) -> Dataset:
    """Give a folder of token files that datatrove wrote its manifest; the tokens stay where they are."""
    if len(text.inputs) != 1 or Path(text.inputs[0]).resolve() != out.resolve():
        raise UsageError(
            f"{text.inputs[0]} holds token files, which are used where they are",
            fix=f"give the same folder twice: resmol prepare {text.inputs[0]} --input {text.inputs[0]}",
        )
    return import_datatrove(out, tokenizer, val_fraction=text.val_fraction)


def is_prepared(folder: Path) -> bool:
    """Tell whether a folder was prepared."""
    return (folder / MANIFEST).is_file()


def data_folder(data: str | None, stored: str, own: Path) -> Path:
    """Return the prepared folder that a run reads, or is going to read.

    Args:
        data: The ``--data`` of the user, if any: a prepared folder, or text.
        stored: ``data.path`` of the run's configuration, relative to the run; empty means the run's own folder.
        own: The run's own folder.
    """
    if data is None:
        return own.parent / stored if stored else own  # an absolute path stays as it is
    return Path(data) if is_prepared(Path(data)) else own


def open_or_prepare(folder: Path, data: str | None, tokenizer: Tokenizer) -> Dataset:
    """Open the prepared folder, after preparing ``data`` into it where that is still to be done.

    Raises:
        DataError: There is nothing to open and nothing to prepare, or ``folder`` was made from another text.
    """
    if not is_prepared(folder):
        if data is None:
            raise DataError(
                f"there is no prepared data in {folder}",
                fix="add --data input.txt, or a folder that `resmol prepare` wrote",
            )
        logger.info(f"preparing {data} into {folder}")
        return prepare_text(folder, Text(inputs=(data,)), tokenizer)
    dataset = open_dataset(folder)
    if data is not None and not is_prepared(Path(data)):
        _check_same_text(dataset, Path(data))
    return dataset


def _check_same_text(dataset: Dataset, path: Path) -> None:
    """Refuse a text file that is not the one that was prepared; folders and pipes are bound by the fingerprint only."""
    if not path.exists():
        raise DataError(f"{path} does not exist", fix="check --data, or leave it out to resume")
    known = {facts.sha256 for facts in dataset.manifest.source.inputs}
    if path.is_file() and file_sha256(path) not in known:
        raise DataError(
            f"{dataset.root} was prepared from another text than {path}",
            fix="start a new run directory for another text, or leave --data out to resume",
        )
