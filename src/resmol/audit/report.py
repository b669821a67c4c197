"""`resmol report`: a run as one self-contained HTML page, for screens in light and dark, phones, and paper."""

from __future__ import annotations

import math
import os
import statistics
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from resmol.audit.certificate import current_certificate
from resmol.audit.claims import read_claims
from resmol.audit.plots import curves, loss_image, resumed_at
from resmol.audit.run_data import recorded_data
from resmol.audit.sources_read import sources_read
from resmol.data.shards import Manifest
from resmol.data.summary import statistics_rows
from resmol.errors import DataError, UsageError
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, effective_steps, last_fact, read_ledger, select
from resmol.run.log_writers import describe
from resmol.system.atomic_io import write_durable
from resmol.system.templates import template_environment
from resmol.system.user_paths import user_path
from resmol.system.wording import counted
from resmol.version import __version__

TIMELINE = ("start", "save", "resume", "rewind", "drift", "warn", "stop")
SMOOTHED_STEPS = 50
MAX_EXPONENT = 700.0  # of a float
MANY_EPOCHS = 4  # up to so many, repeated text is worth nearly as much as new text (Muennighoff et al. 2023)
HELD_OUT = {
    "named": "as the text names it",
    "documents": "whole documents, chosen by hash",
    "position": "the end of the text, since it is a single document",
    "none": "nothing",
}
# Raised by records whose chain holds but in which a field is missing or has another type.
MALFORMED_RECORD = (TypeError, ValueError, KeyError, AttributeError, IndexError, StopIteration, jinja2.TemplateError)


IMAGES = (".svg", ".png")


def report_run(run: str | Path, out: str | Path | None = None, *, plot: str | Path | None = None) -> Path:
    """Write a run as one page, or its loss curve as an image, as `resmol report` does; return the path.

    Args:
        run: The run directory.
        out: Where to write the page; None is ``report.html`` in the run.
        plot: Write the loss curve instead, as .svg or .png.

    Raises:
        UsageError: Both are given.
    """
    if plot is not None and out is not None:
        raise UsageError("--out and --plot are both given", fix="give one of them; --plot names the image itself")
    directory = RunDir(Path(run))
    if plot is not None:
        write_loss_image(directory, Path(plot))
        return Path(plot)
    return write_report(directory, None if out is None else Path(out))


def write_loss_image(run: RunDir, out: Path) -> None:
    """Write the loss curve of a run as an image, SVG or PNG by the name of ``out``.

    Raises:
        UsageError: The name ends with neither.
        DataError: This is not a run directory, it has no ledger, or no step was recorded.
        LedgerTampered: The hash chain of the ledger is broken.
    """
    out = user_path(out)
    if out.suffix not in IMAGES:
        raise UsageError(f"--plot {out} is neither .svg nor .png", fix=f"name it {out.with_suffix('.svg')}")
    run.require()
    records = read_ledger(run.ledger).records
    if not effective_steps(records):
        raise DataError(f"{run.path} has not recorded a step yet", fix="plot it after some steps")
    write_durable(out, loss_image(records, out.suffix))


def write_report(run: RunDir, out: Path | None = None) -> Path:
    """Write the page and return its path.

    Args:
        run: The run directory.
        out: The file to write; None writes ``RUN/report.html``.

    Raises:
        DataError: This is not a run directory, it has no ledger, or records of the ledger are malformed.
        LedgerTampered: The hash chain of the ledger is broken.
    """
    run.require()
    content = read_ledger(run.ledger)
    target = run.report if out is None else user_path(out)
    environment = template_environment("resmol.audit", autoescape=True)
    config = run.load_config()
    dataset = recorded_data(run, config)
    try:
        page = environment.get_template("report.html.j2").render(
            version=__version__,
            title=run.path.resolve().name,
            config=config,
            config_text=run.config.read_text(encoding="utf-8"),
            facts=summary_facts(content.records),
            curves=curves(content.records),
            samples=samples(content.records),
            timeline=timeline(content.records),
            environment=last_environment(content.records),
            data=None if dataset is None else data_facts(dataset.manifest),
            sources=sources_read(content.records, effective_steps(content.records).values()),
            fingerprint=last_fact(content.records, "data_fingerprint"),
            epochs=epochs_seen(content.records),
            many_epochs=MANY_EPOCHS,
            claims=[{**claim, "link": _link(run, claim["evidence"], target.parent)} for claim in read_claims(run)],
            certificate=current_certificate(run),
            checkpoints=list(select(content.records, "save")),
            head=content.head,
            lines=len(content.records),
            torn=len(content.torn),
        )
    except MALFORMED_RECORD as error:
        raise DataError(
            f"{run.path} cannot be put into a report ({type(error).__name__}: {error})",
            fix="its records were not written by this version of resmol; report on another run",
        ) from error
    write_durable(target, page.encode("utf-8", errors="replace"))
    return target


def summary_facts(records: list[Record]) -> list[tuple[str, str]]:
    """Return the most important facts of a run, as names and values."""
    facts = [("parameters", f"{record['parameters']:,}") for record in select(records, "start")]
    steps = list(effective_steps(records).values())
    if steps:
        last, seconds = steps[-1], sum(record["seconds"] for record in steps)
        recent = [record["loss"] for record in steps[-SMOOTHED_STEPS:]]
        rate = statistics.median(record["tokens"] / max(record["seconds"], 1e-9) for record in steps)
        facts += [
            ("steps", f"{last['step']:,}"),
            ("tokens seen", f"{last['tokens_seen']:,} ({last['epoch']:.2f} epochs)"),
            (
                f"training loss, mean of the last {counted(len(recent), 'step')}",
                f"{statistics.fmean(recent):.4f} nats per token",
            ),
            ("tokens per second, median", f"{rate:,.0f}"),
            ("training time, steps alone", duration(seconds)),
        ]
    for record in list(select(records, "eval"))[-1:]:
        by_source = record.get("source_losses", {})
        at = f"at step {record['step']:,}"
        facts += [
            (f"held-out loss {at}", f"{record['loss']:.4f} nats per token"),
            *((f"held-out loss of {name} {at}", f"{loss:.4f} nats per token") for name, loss in by_source.items()),
            (f"held-out perplexity {at}", f"{math.exp(min(record['loss'], MAX_EXPONENT)):,.1f}"),
            (f"held-out bits per byte {at}", f"{record['bits_per_byte']:.4f}"),
        ]
    facts.append(("resumed", _resumed(len(resumed_at(records)))))
    return facts


def _resumed(times: int) -> str:
    return {0: "never", 1: "once"}.get(times, f"{times} times")


def data_facts(data: Manifest) -> dict[str, Any]:
    """Return what is known of the text: its inputs with licence and hash, and what was held out."""
    train, val, source = data.train, data.val, data.source
    return {
        "inputs": source.inputs,
        "train": train,
        "val": val,
        "share": val.tokens / max(train.tokens + val.tokens, 1),
        "held_out": HELD_OUT[source.held_out],
        "duplicates": source.duplicates,
        "val_in_train": source.val_in_train,
        "statistics": statistics_rows(data),
    }


def epochs_seen(records: list[Record]) -> float:
    """Return how often the run has seen its training text; 0 before the first step."""
    return float(next((record["epoch"] for record in reversed(effective_steps(records).values())), 0.0))


def _link(run: RunDir, evidence: str, page: Path) -> str | None:
    """Return the address of a file of the run as seen from the page; None where there is no such file in the run."""
    file, home = (run.path / evidence).resolve(), run.path.resolve()
    if not evidence or not file.is_relative_to(home) or not file.exists():
        return None
    return quote(os.path.relpath(file, page.resolve()).replace(os.sep, "/"))


def duration(seconds: float) -> str:
    """Return a duration as text, such as ``1 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def samples(records: list[Record]) -> list[Record]:
    """Return the samples of the effective history, newest first."""
    return list({record["step"]: record for record in select(records, "sample")}.values())[::-1]


def timeline(records: list[Record]) -> list[tuple[str, str, str]]:
    """Return time, kind and text of every event of the run besides its steps."""
    return [
        (
            datetime.fromisoformat(record["time"]).strftime("%Y-%m-%d %H:%M:%S"),
            record["kind"],
            describe(record) or "",
        )
        for record in records
        if record["kind"] in TIMELINE
    ]


def last_environment(records: list[Record]) -> dict[str, Any]:
    """Return the last recorded facts about machine and libraries."""
    found = [record["environment"] for record in records if record["kind"] in ("start", "resume")]
    return dict(found[-1]) if found else {}
