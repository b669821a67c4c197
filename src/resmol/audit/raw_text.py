"""Prepare the text of a run again and compare: the inputs by their hashes, the tokens shard by shard."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from resmol.audit.segment import Outcome
from resmol.data.builtin_corpora import STANDARD_LIBRARY, corpus_of
from resmol.data.remote_files import is_address
from resmol.data.resolve import Text, prepare_text
from resmol.data.shards import Dataset, Shard
from resmol.data.source_facts import InputFacts, SourceFacts
from resmol.data.tokenizer import Tokenizer
from resmol.errors import NetworkError, UsageError
from resmol.run.directory import RunDir
from resmol.system.atomic_io import remove_directory
from resmol.system.wording import counted

TEXT_EXPECTED = "the inputs have the recorded bytes and hashes"
TOKENS_EXPECTED = "the same shards come out of the text again, byte for byte"


def prepare_again(dataset: Dataset, run: RunDir, inputs: Sequence[str], scratch: Path) -> tuple[Outcome, Outcome]:
    """Make the tokens of a dataset again from its text.

    Args:
        dataset: The prepared folder, verified against its manifest.
        run: A run with a copy of its tokenizer.
        inputs: Where its inputs lie, in their order; empty takes the corpus or the addresses that it was made from.
        scratch: A folder to prepare into; it is removed again.

    Returns:
        What is to be said of the inputs, and of the tokens.

    Raises:
        DataError: An input that was named is not there, or cannot be read.
        DiskFull: There is no room for the tokens.
    """
    facts = dataset.manifest.source
    found = recorded_text(facts, inputs)
    if isinstance(found, Outcome):
        return found, Outcome("UNSUPPORTED", "not compared without the text")
    tokenizer = Tokenizer(run.tokenizer.read_bytes(), run.tokenizer, eos_id=dataset.eos_id)
    if tokenizer.sha256 != dataset.tokenizer_sha256:
        words = f"tokenizer.json of the run has sha256 {tokenizer.sha256}, recorded is {dataset.tokenizer_sha256}"
        return Outcome("UNSUPPORTED", "not read, since the tokenizer is another one"), Outcome("FAIL", words)
    try:
        fresh = prepare_text(scratch, found, tokenizer)
        return _compare_inputs(fresh.manifest.source, facts), _compare_tokens(fresh, dataset)
    except NetworkError as error:
        return Outcome("UNSUPPORTED", error.what), Outcome("UNSUPPORTED", "not compared without the text")
    finally:
        if scratch.exists():
            remove_directory(scratch)


def recorded_text(facts: SourceFacts, inputs: Sequence[str]) -> Text | Outcome:
    """Return the recorded text where it lies now, or why it cannot be read."""
    if facts.reading is None:
        return Outcome("UNSUPPORTED", "the manifest of the data does not record how its text was read")
    names = [one.name for one in facts.inputs]
    if inputs:
        return Text.recorded(facts, inputs)
    corpus = corpus_of(names)
    if corpus == "stdlib" and names != [f"{STANDARD_LIBRARY} {platform.python_version()}"]:
        return Outcome("UNSUPPORTED", f"this is Python {platform.python_version()}, the text is the {names[0]}")
    if corpus is not None:
        return Text.recorded(facts, (), corpus)
    missing = [one for one in facts.inputs if not is_address(one.name)]
    if missing:
        options = " ".join(["--input PATH"] * len(names))
        shown = ", ".join(map(_shown, missing))
        return Outcome("UNSUPPORTED", f"recorded and not at hand: {shown}; say where it is: {options}")
    return Text.recorded(facts, names)


def inputs_by_source(datasets: dict[str, Dataset], given: Sequence[str]) -> dict[str, list[str]]:
    """Return which of the paths that were given are the inputs of each source, in their order.

    Of a single source, as many paths as it has inputs may have any names; otherwise the names say what they are.

    Raises:
        UsageError: A path has the name of no input.
    """
    recorded = {source: [one.name for one in data.manifest.source.inputs] for source, data in datasets.items()}
    if len(recorded) == 1 and len(given) == len(next(iter(recorded.values()))):
        return {source: list(given) for source in recorded}
    names = {path if is_address(path) else Path(path).name: path for path in given}
    known = {name for listed in recorded.values() for name in listed}
    if surplus := [path for name, path in names.items() if name not in known]:
        raise UsageError(
            f"--input {surplus[0]} is none of the inputs that the run records: {', '.join(sorted(known))}",
            fix="give each of them once, in their order or by their names",
        )
    return {
        source: [names[name] for name in listed] if all(name in names for name in listed) else []
        for source, listed in recorded.items()
    }


def _compare_inputs(now: SourceFacts, then: SourceFacts) -> Outcome:
    for found, recorded in zip(now.inputs, then.inputs, strict=True):
        if (found.files, found.bytes, found.sha256) != (recorded.files, recorded.bytes, recorded.sha256):
            return Outcome("FAIL", f"{_shown(found)}; recorded is {_shown(recorded)}")
    size = sum(one.bytes for one in then.inputs)
    return Outcome("PASS", f"{', '.join(one.name for one in then.inputs)}: {counted(size, 'byte')}, as recorded")


def _shown(facts: InputFacts) -> str:
    files = "" if facts.files == 1 else f"{counted(facts.files, 'file')} of "
    return f"{facts.name} ({files}{counted(facts.bytes, 'byte')}, sha256 {facts.sha256[:16]})"


def _compare_tokens(fresh: Dataset, dataset: Dataset) -> Outcome:
    for ours, recorded in zip(_shards(fresh), _shards(dataset), strict=False):
        if (ours.name, ours.sha256) != (recorded.name, recorded.sha256):
            words = f"{recorded.name} has sha256 {recorded.sha256[:16]}; {ours.sha256[:16]} comes out of the text"
            return Outcome("FAIL", words, evidence=str(dataset.root / recorded.name))
    if fresh.fingerprint != dataset.fingerprint:
        counts = [len(_shards(one)) for one in (dataset, fresh)]
        return Outcome("FAIL", f"the data has {counted(counts[0], 'shard')}; {counts[1]} come out of the text")
    tokens = len(fresh.train) + len(fresh.val)
    shards = counted(len(_shards(fresh)), "shard")
    return Outcome("PASS", f"{shards} with {counted(tokens, 'token')}, fingerprint {fresh.fingerprint[:16]}")


def _shards(dataset: Dataset) -> list[Shard]:
    return [*dataset.manifest.train.shards, *dataset.manifest.val.shards]
