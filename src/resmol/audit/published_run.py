"""Published runs: a small file each, from which a stranger makes a portable run again and compares every step.

It holds no tokens and no weights: the recorded text says which corpus to read and what its bytes hash to, the
configuration fixes all that the numbers depend on, and the steps are their bits. Nothing of the run that it describes
is needed, only this package and the corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import Field, ValidationError

from resmol.audit.raw_text import recorded_text
from resmol.audit.segment import Outcome
from resmol.checks import Check
from resmol.config.load import load_preset, preset_names
from resmol.config.run_config import RunConfig, flatten
from resmol.config.strict_model import StrictModel
from resmol.config.tables import nested
from resmol.data.resolve import prepare_text
from resmol.data.shards import Dataset
from resmol.data.source_facts import Digest, SourceFacts
from resmol.data.sources import open_recorded
from resmol.data.tokenizer import load_tokenizer
from resmol.errors import ConfigError, DataError, ResmolError, UsageError
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, effective_steps, read_ledger, select
from resmol.system.atomic_io import write_durable
from resmol.system.installation import source_commit
from resmol.system.progress import step_progress
from resmol.system.wording import counted, in_words
from resmol.train.build import make_loader, new_state
from resmol.train.parallel import Runtime, open_runtime
from resmol.train.portable import require_portable
from resmol.train.resume import changed_facts
from resmol.train.step import train_step
from resmol.version import __version__

FIELDS = ("loss_bits", "grad_norm_bits", "fingerprint")  # of a step, in this order
MOST_BYTES = 10_000_000
TEXT, STEPS = "published text", "published steps"
TEXT_EXPECTED = "the tokens that were published come out of the text"
EXPECTED = "the published bits of loss and gradient norm and fingerprint of the weights, step by step"


class PublishedRun(StrictModel):
    """What a portable run was made from, and what came out.

    Attributes:
        command: How it was made, to be read.
        resmol: The version that made it, and the commit of its sources where they were a checkout.
        data_fingerprint: Of the prepared tokens.
        source: What they were prepared from, with its hashes.
        config: ``section.key`` -> value of all that the numbers depend on.
        steps: The bits of each step, as `FIELDS`, from the first on.
        digest: The sha256 of ``steps``, a line each: what to publish elsewhere and to compare at a glance.
        machines: The machines that it was seen on.
    """

    format: Literal["resmol-published-run"] = "resmol-published-run"
    format_version: Literal[1] = 1
    command: str
    resmol: str
    data_fingerprint: Digest
    source: SourceFacts
    config: dict[str, Any]
    steps: tuple[str, ...] = Field(min_length=1)
    digest: Digest
    machines: tuple[dict[str, str | int], ...] = Field(min_length=1)

    @classmethod
    def read(cls, path: Path) -> PublishedRun:
        """Read a file (`DataError` when it is none of these, or its digest is not that of its steps)."""
        try:
            with path.open("rb") as file:
                published = cls.model_validate_json(file.read(MOST_BYTES))
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror}", fix="name a file such as records/nano-100.json"
            ) from None
        except ValidationError as error:
            raise DataError(
                f"{path} describes no published run: {error.errors()[0]['msg']}", fix="restore the file"
            ) from None
        if published.digest != digest_of(published.steps):
            raise DataError(f"{path}: its digest is not that of its steps", fix="restore the file from a copy")
        return published

    def seen_again(self, other: PublishedRun) -> PublishedRun:
        """Return this run with the machines of another that made it again.

        Raises:
            UsageError: The other is another run.
        """
        same = ("data_fingerprint", "config", "steps")
        if differing := [name for name in same if getattr(self, name) != getattr(other, name)]:
            raise UsageError(
                f"the file holds another run: its {differing[0]} differs",
                fix="name another file, or remove this one",
            )
        new = tuple(machine for machine in other.machines if machine not in self.machines)
        return self.model_copy(update={"machines": self.machines + new})

    def write(self, path: Path) -> None:
        """Write the file."""
        write_durable(path, self.model_dump_json(indent=1).encode() + b"\n")


def digest_of(steps: Sequence[str]) -> str:
    """Return the sha256 of the bits of all steps, a line for each."""
    return hashlib.sha256("".join(f"{step}\n" for step in steps).encode()).hexdigest()


def bits_of(record: Record) -> str:
    """Return the bits of a step's record, one after the other."""
    return " ".join(str(record[name]) for name in FIELDS)


def publish(run: RunDir) -> PublishedRun:
    """Return what others need to make a portable run again.

    Raises:
        UsageError: It is no portable run of one text, or its configuration was changed, or its weights not recorded.
        DataError: Its data is not here.
    """
    config, records = run.load_config(), read_ledger(run.ledger).records
    steps = effective_steps(records)
    data = open_recorded(run, config.data)
    if not isinstance(data, Dataset):
        raise _unpublishable(run, "it is of a mixture")
    if data.manifest.source.reading is None:
        raise _unpublishable(run, "its data does not record how the text was read")
    if config.runtime.determinism != "portable":
        raise _unpublishable(run, "its runtime.determinism is not portable")
    if not steps or any(set(FIELDS) - set(step) for step in steps.values()):
        raise _unpublishable(run, "its ledger has no step, or no fingerprints")
    if any(select(records, "drift")):
        raise _unpublishable(run, "its configuration was changed")
    bits = tuple(bits_of(steps[step]) for step in sorted(steps))
    return PublishedRun(
        command=_command(config, len(bits)),
        resmol=f"{__version__} {source_commit() or ''}".rstrip(),
        data_fingerprint=data.fingerprint,
        source=data.manifest.source,
        config=config.bound_fields(),
        steps=bits,
        digest=digest_of(bits),
        machines=(next(select(records, "start"))["environment"],),
    )


def _unpublishable(run: RunDir, why: str) -> UsageError:
    return UsageError(
        f"others cannot make {run.path} again: {why}",
        fix="train a new run on one text with --set runtime.determinism=portable",
    )


def _command(config: RunConfig, steps: int) -> str:
    """Return the command of a configuration, by what it changes in its preset; with a file where it is of none."""
    begin = f"resmol train RUN --data DATA --steps {steps}"
    if config.name not in preset_names():
        return f"{begin} --config FILE"
    ours, preset = config.bound_fields(), flatten(load_preset(config.name, ["runtime.determinism=portable"]))
    changed = [quote(f"{key}={value}") for key, value in ours.items() if preset.get(key) not in (value, "auto")]
    options = [f"--set {change}" for change in ("runtime.determinism=portable", *changed)]
    return " ".join([begin, f"--preset {config.name}", *options])


def redo(published: PublishedRun, inputs: Sequence[str] = (), *, strict: bool = False) -> list[Check]:
    """Make a published run again, in a temporary folder, up to the first difference.

    Args:
        published: The run.
        inputs: Where its text lies; empty takes the corpus or the addresses that it was made from.
        strict: What cannot be judged here is a failure.

    Returns:
        A check of the text and one of the steps, whose measured text begins with PASS, FAIL or UNSUPPORTED.
    """
    with TemporaryDirectory(prefix="resmol-") as scratch:
        found = _text_again(published, inputs, Path(scratch) / "data")
        if isinstance(found, Outcome):
            return [found.check(TEXT, strict=strict, expected=TEXT_EXPECTED)]
        tokens = len(found.train) + len(found.val)
        words = f"{counted(tokens, 'token')}, fingerprint {found.fingerprint[:16]}"
        text = Outcome("PASS", words).check(TEXT, expected=TEXT_EXPECTED)
        return [text, _steps_again(published, found).check(STEPS, strict=strict, expected=EXPECTED)]


def _text_again(published: PublishedRun, inputs: Sequence[str], folder: Path) -> Dataset | Outcome:
    """Prepare the text of a published run, or return why it is not that text."""
    text = recorded_text(published.source, inputs)
    if isinstance(text, Outcome):
        return text
    try:
        data = prepare_text(folder, text, load_tokenizer(sha256=published.config["tokenizer.sha256"]))
    except ResmolError as error:
        return Outcome("UNSUPPORTED", error.what)
    if data.fingerprint != published.data_fingerprint:
        words = f"the tokens have fingerprint {data.fingerprint[:16]}, published is {published.data_fingerprint[:16]}"
        return Outcome("FAIL", words)
    return data


def _steps_again(published: PublishedRun, data: Dataset) -> Outcome:
    try:
        config = RunConfig.parse(nested(published.config), "of the published run")
        require_portable(config)
    except ConfigError as error:
        return Outcome("UNSUPPORTED", error.what)
    with open_runtime(config) as runtime:
        if changed := changed_facts(published.machines[0], runtime.environment(), config):
            return Outcome("UNSUPPORTED", f"another library or system: {in_words(changed)}")
        return _compare_steps(published, config, data, runtime)


def _compare_steps(published: PublishedRun, config: RunConfig, data: Dataset, runtime: Runtime) -> Outcome:
    """Execute the steps from the initial weights on; return the first difference."""
    state, loader = new_state(config, runtime), make_loader(config, data.train)
    with step_progress("published run", len(published.steps)) as advance:
        for number, expected in enumerate(published.steps, start=1):
            try:
                found = bits_of(train_step(state, loader.step_after(state.windows_seen), config, runtime).to_record())
            except ResmolError as error:
                return Outcome("FAIL", error.what, f"at step {number}")
            for name, ours, theirs in zip(FIELDS, found.split(), expected.split(), strict=False):
                if ours != theirs:
                    return Outcome("FAIL", f"{name} is {ours}, published is {theirs}", f"at step {number}")
            if found != expected:
                return Outcome("FAIL", f"the published step says {expected!r}", f"at step {number}")
            advance(1)
    return Outcome("PASS", f"{counted(len(published.steps), 'step')}, digest {published.digest[:16]} as published")
