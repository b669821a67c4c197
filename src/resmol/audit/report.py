"""`resmol report`: a run as one self-contained HTML page."""

from __future__ import annotations

import statistics
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from resmol.audit.certificate import current_certificate
from resmol.audit.claims import read_claims
from resmol.audit.plots import curves, loss_image
from resmol.errors import DataError, UsageError
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, effective_steps, read_ledger, select
from resmol.run.log_writers import describe
from resmol.system.atomic_io import write_durable
from resmol.system.templates import template_environment
from resmol.system.user_paths import user_path
from resmol.system.wording import counted
from resmol.version import __version__

TIMELINE = ("start", "save", "resume", "rewind", "drift", "warn", "stop")
SMOOTHED_STEPS = 50
# Raised by records whose chain holds but in which a field is missing or has another type.
MALFORMED_RECORD = (TypeError, ValueError, KeyError, AttributeError, IndexError, StopIteration, jinja2.TemplateError)


IMAGES = (".svg", ".png")


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
    environment = template_environment("resmol.audit", autoescape=True)
    try:
        page = environment.get_template("report.html.j2").render(
            version=__version__,
            title=run.path.resolve().name,
            config=run.load_config(),
            config_text=run.config.read_text(encoding="utf-8"),
            facts=summary_facts(content.records),
            curves=curves(content.records),
            samples=samples(content.records),
            timeline=timeline(content.records),
            environment=last_environment(content.records),
            claims=read_claims(run),
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
    target = run.report if out is None else user_path(out)
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
        facts.append((f"held-out loss at step {record['step']}", f"{record['loss']:.4f} nats per token"))
        facts.append((f"bits per byte at step {record['step']}", f"{record['bits_per_byte']:.4f}"))
    resumes = sum(1 for _ in select(records, "resume"))
    facts.append(("resumed", "once" if resumes == 1 else f"{resumes} times"))
    return facts


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
