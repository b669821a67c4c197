"""Where the tokens of a run come from: a prepared folder, or text that is prepared on the fly."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath

from resmol.data.builtin_corpora import named_corpus
from resmol.data.datatrove import import_datatrove, is_token_folder
from resmol.data.prepare import Progress, prepare
from resmol.data.readers import Corpus, input_facts, read_inputs, with_held_out
from resmol.data.remote_files import is_address
from resmol.data.shards import MANIFEST, Dataset, open_dataset
from resmol.data.source_facts import Reading, SourceFacts
from resmol.data.summary import log_summary
from resmol.data.text_file import ReadOptions
from resmol.data.tokenizer import Tokenizer
from resmol.errors import DataError, UsageError
from resmol.run.directory import RunDir
from resmol.run.ledger import first_record, scan
from resmol.system.atomic_io import remove_directory
from resmol.system.progress import byte_progress
from resmol.system.user_paths import user_path
from resmol.system.wording import counted

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("as-tokens", "as-text")


@dataclass(frozen=True)
class Text:
    """Which text to prepare, and how.

    Attributes:
        inputs: Files, folders, or ``-``.
        val: Files and folders to hold out, all of them and nothing else.
        corpus: The name of a corpus; exclusive with ``inputs``.
        val_fraction: Share of the documents that is held out where the text does not say what is.
        options: How to read the inputs.
        special_tokens: ``as-tokens``: the spelling of a control token becomes that token; ``as-text``: it is text.
        dedup: Leave out exact copies of documents.
        max_tokens: How many tokens to take of it, about; None takes all.
    """

    inputs: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    corpus: str | None = None
    val_fraction: float = 0.01
    options: ReadOptions = field(default_factory=ReadOptions)
    special_tokens: str = "as-tokens"
    dedup: bool = False
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.special_tokens not in SPECIAL_TOKENS:
            raise UsageError(
                f"--special-tokens is {self.special_tokens!r}", fix=f"choose one of: {', '.join(SPECIAL_TOKENS)}"
            )

    @property
    def reading(self) -> Reading:
        """How it is read, for the manifest."""
        options = self.options
        return Reading(
            text_field=options.text_field, encoding=options.encoding, format=options.format,
            include_hidden=options.include_hidden, special_tokens=self.special_tokens, val_inputs=len(self.val),
        )  # fmt: skip

    @classmethod
    def recorded(cls, facts: SourceFacts, inputs: Sequence[str] = (), corpus: str | None = None) -> Text:
        """Return the text that a manifest was made from, to prepare it again.

        Args:
            facts: What the manifest records; it has a ``reading``.
            inputs: Where its inputs lie now, in their order; none for a corpus.
            corpus: The name of the corpus that it was.
        """
        reading = facts.reading
        assert reading is not None, "how the text was read was recorded"
        options = ReadOptions(
            reading.text_field, reading.encoding, reading.format, reading.include_hidden, facts.sample_seed
        )
        first = len(inputs) - reading.val_inputs
        return cls(
            tuple(inputs[:first]), tuple(inputs[first:]), corpus, facts.val_fraction, options, reading.special_tokens,
            facts.dedup == "exact", facts.max_tokens,
        )  # fmt: skip

    def open(self) -> Corpus:
        """Return the documents (`UsageError` unless exactly one of inputs and corpus is given)."""
        if bool(self.inputs) == (self.corpus is not None):
            raise UsageError("give either --input or --corpus", fix="e.g. --input input.txt, or --corpus shakespeare")
        if self.corpus is not None:
            if self.options != ReadOptions() or self.val:
                raise UsageError("a named corpus is read in one way", fix="give options for reading with --input only")
            return named_corpus(self.corpus)
        inputs = read_inputs(self.inputs, self.options)
        return with_held_out(inputs, read_inputs(self.val, self.options)) if self.val else inputs


def prepare_text(out: Path, text: Text, tokenizer: Tokenizer) -> Dataset:
    """Prepare text into the folder ``out`` and show the progress on a terminal; raises what `prepare` raises."""
    out = user_path(out)
    for path in (*text.inputs, *text.val):
        if is_prepared(user_path(path)):
            raise UsageError(f"{path} is prepared already", fix=f"use it as it is: --data {path}")
    if any(is_token_folder(user_path(path)) for path in (*text.inputs, *text.val)):
        return _adopt(out, text, tokenizer)
    if text.special_tokens == "as-text":
        tokenizer = tokenizer.with_special_tokens_as_text()
    corpus = replace(text.open(), reading=text.reading)
    with byte_progress("preparing") as advance:

        def show(progress: Progress) -> None:
            note = counted(progress.tokens, "token")
            advance(progress.bytes_done, progress.bytes_total, note, kept=progress.bytes_kept)

        dataset = prepare(
            out, corpus, tokenizer, val_fraction=text.val_fraction, dedup=text.dedup, max_tokens=text.max_tokens,
            on_progress=show,
        )  # fmt: skip
    log_summary(dataset)  # after the bar is gone, so that the two do not write over each other
    return dataset


def _adopt(out: Path, text: Text, tokenizer: Tokenizer) -> Dataset:
    """Give a folder of token files that datatrove wrote its manifest; the tokens stay where they are."""
    if text.val or len(text.inputs) != 1 or user_path(text.inputs[0]).resolve() != out.resolve():
        raise UsageError(
            f"{text.inputs[0]} holds token files, which are used where they are",
            fix=f"give the same folder twice: resmol prepare {text.inputs[0]} --input {text.inputs[0]}",
        )
    return import_datatrove(out, tokenizer, val_fraction=text.val_fraction)


def is_prepared(folder: Path) -> bool:
    """Return whether a folder was prepared."""
    return (folder / MANIFEST).is_file()


def named_folder(data: str, run: RunDir) -> Path:
    """Return the prepared folder that ``--data`` names; for text, the run's own, in which it is going to be."""
    folder = user_path(data)
    return folder if is_prepared(folder) else run.data


def stored_folder(run: RunDir, path: str, source: str = "") -> Path:
    """Return the folder that a path of a run's configuration names, relative to the run.

    Args:
        run: The run directory.
        path: ``data.path``, or that of a source; empty is the run's own folder for it.
        source: The name of a source of a mixture.
    """
    return run.path / user_path(path) if path else run.data / source


def recorded_folder(run: RunDir, path: str, source: str = "") -> Path:
    """Return the prepared folder that a run was trained on: where it was, or where it moved to with the run.

    Another folder must hold the same tokens, by the fingerprint in the run's ledger. It is looked for in the run, and
    below the folders that the run lies in, by the end of its path: whoever moves or copies both together moves or
    copies a folder above both.

    Args:
        run: The run directory.
        path: ``data.path`` of its configuration, or the path of a source.
        source: The name of a source of a mixture.

    Raises:
        DataError: The run has begun, and its data is not there.
    """
    folder = stored_folder(run, path, source)
    fingerprint = _recorded_fingerprint(run, source)
    if not isinstance(fingerprint, str) or _holds(folder, fingerprint) or not run.has_begun():
        return folder
    for other in _places(run, path):
        if _holds(other, fingerprint):
            logger.info(f"data: {folder} does not hold the data of the run; {other} does")
            return other
    if not is_prepared(folder):
        called = f" called {source}" if source else ""
        gone = f"the data of {run.path}{called} is not in {folder} any more, and nowhere beside the run"
        raise DataError(
            gone if path or source else f"{run.config} is missing, which says where the data of {run.path} is",
            fix="write the path of the folder where it is now into config.toml of the run (its fingerprint is compared)"
            if source
            else "name the folder where it is now, or the text that it was made from: --data PATH (its fingerprint is "
            "compared)",
        )
    return folder


def _recorded_fingerprint(run: RunDir, source: str) -> object:
    """Return the fingerprint of a run's data, or of a source, as the ledger states it last; None where it does not."""
    if not source:
        return (first_record(run.ledger) or {}).get("data_fingerprint")
    recorded = [one for record in scan(run.ledger, "start", "drift") for one in record.get("sources", ())]
    return next((one["fingerprint"] for one in reversed(recorded) if one["name"] == source), None)


def _places(run: RunDir, path: str) -> Iterator[Path]:
    """Yield where data may be that moved with a run: each end of its path, below each folder that the run lies in."""
    yield run.data
    stored = PureWindowsPath(path)  # which has both kinds of slashes, and drives
    names = [name for name in stored.parts if name not in (stored.anchor, "..")]
    for folder in run.path.resolve().parents:
        for length in range(1, len(names) + 1):
            yield folder.joinpath(*names[-length:])


def _holds(folder: Path, fingerprint: str) -> bool:
    """Return whether a folder holds the data with this fingerprint."""
    try:
        return is_prepared(folder) and open_dataset(folder).fingerprint == fingerprint
    except (DataError, OSError):
        return False


def open_or_prepare(folder: Path, text: Text | None, tokenizer: Tokenizer, *, replace: bool = False) -> Dataset:
    """Open the prepared folder, after preparing ``text`` into it where that is still to be done.

    Args:
        folder: The prepared folder.
        text: What was asked for; None takes the folder as it is.
        tokenizer: Makes the tokens.
        replace: Prepare ``text`` anew where the folder was made from another text or with another tokenizer: no run has
            used it yet.

    Raises:
        DataError: There is nothing to open and nothing to prepare, or ``folder`` was made from another text.
    """
    if not is_prepared(folder):
        if text is None:
            raise DataError(
                f"there is no prepared data in {folder}",
                fix="add --data input.txt, or a folder that `resmol prepare` wrote",
            )
        logger.info(f"preparing {', '.join((*text.inputs, *text.val))} into {folder}")
        return prepare_text(folder, text, tokenizer)
    sources = () if text is None else (*text.inputs, *text.val)
    try:
        dataset = open_dataset(folder)
        for source in sources:
            if not is_prepared(user_path(source)):
                check_same_inputs(dataset, source if is_address(source) else user_path(source))
            elif text is not None and text.val:
                raise UsageError(f"{source} is prepared already, with its held-out text", fix="leave --val out")
        made_of_these = len(sources) == len(dataset.manifest.source.inputs)
        if text is None or not replace or (made_of_these and dataset.tokenizer_sha256 == tokenizer.sha256):
            return dataset
    except DataError:
        if (
            text is None
            or not replace
            or not all(is_address(source) or user_path(source).exists() for source in sources)
        ):
            raise
    logger.info(f"{folder} was prepared for a start that failed, from something else: preparing it anew")
    remove_directory(folder)
    return prepare_text(folder, text, tokenizer)


def check_same_inputs(dataset: Dataset, source: str | Path) -> None:
    """Refuse a text file or a folder that does not hold what was prepared; a pipe cannot be compared.

    Raises:
        DataError: It does not exist, or holds other files or other text than the manifest records.
    """
    if isinstance(source, Path) and not source.exists():
        raise DataError(f"{source} does not exist", fix="check --data, or leave it out to resume")
    if isinstance(source, Path) and not (source.is_file() or source.is_dir()):
        return
    now, known = input_facts(source), dataset.manifest.source.inputs
    if any((now.files, now.bytes, now.sha256) == (then.files, then.bytes, then.sha256) for then in known):
        return
    files, size = sum(then.files for then in known), sum(then.bytes for then in known)
    raise DataError(
        f"{dataset.root} was prepared from another text than {source} holds now: {counted(files, 'file')} of {size:,} "
        f"bytes then, {now.files} of {now.bytes:,} now",
        fix="start a new run directory for another text, or leave --data out to resume",
    )
