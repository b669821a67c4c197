"""How long the help page takes, and the first step of a new run: ``python benchmarks/startup.py``."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from resmol.bench.comparison import Comparison, Quantity, Variant, make_variants
from resmol.bench.machine import machine_facts
from resmol.bench.subprocess_runs import QUIET, prepared_folder, run_process, run_training
from resmol.bench.workers.main import Metrics
from resmol.cli.terminal import show_messages
from resmol.config.load import load_preset
from resmol.config.run_config import RunConfig
from resmol.errors import ResmolError
from resmol.run.ledger import effective_steps

SECONDS = Quantity("seconds", "seconds", ".2f")


def startup_comparisons(config: RunConfig, folder: Path, data: str) -> list[Comparison]:
    """Return the comparisons of the help page and of the first step of a run, ready to run.

    Args:
        config: The configuration of the run.
        folder: For the files of the run.
        data: A prepared folder.
    """
    return [
        _comparison(
            "resmol --help",
            make_variants(
                lambda: python_metrics(["-m", "resmol", "--help"]),
                {},
                ("roofline: an empty program", lambda: python_metrics(["-c", "pass"])),
            ),
            config,
        ),
        _comparison(
            f"from the start of the process to the end of the first step of {config.name}",
            make_variants(
                lambda: first_step_metrics(config, folder, data),
                {},
                ("roofline: importing PyTorch", lambda: python_metrics(["-c", "import torch"])),
            ),
            config,
        ),
    ]


def _comparison(title: str, variants: list[Variant], config: RunConfig) -> Comparison:
    facts = machine_facts(config.runtime.threads)
    return Comparison(title, SECONDS, (), variants, facts, more_is_better=False)


def python_metrics(arguments: Sequence[str]) -> Metrics:
    """Return the seconds that the Python interpreter takes with these arguments (`CheckFailed` if it fails)."""
    done = run_process([sys.executable, *arguments])
    done.require_success()
    return {"seconds": done.seconds}


def first_step_metrics(config: RunConfig, folder: Path, data: str) -> Metrics:
    """Return the seconds until `resmol train` has recorded its first step (`CheckFailed` if it fails)."""
    started = time.time()  # the ledger has the time of day
    run = run_training(config, folder, data, steps=1)
    run.process.require_success()
    stepped = datetime.fromisoformat(effective_steps(run.records)[1]["time"]).timestamp()
    return {"seconds": stepped - started}


def main(
    preset: Annotated[str, typer.Option(help="The preset to train.")] = "nano",
    data: Annotated[str | None, typer.Option(help="Prepared folder or text; Shakespeare by default.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each measures every variant once.")] = 5,
) -> None:
    """Measure the start of resmol and print the tables as Markdown."""
    show_messages()
    config = load_preset(preset).replace(QUIET)
    with tempfile.TemporaryDirectory(prefix="resmol-startup-") as name:
        folder = Path(name)
        for comparison in startup_comparisons(config, folder, prepared_folder(data, config, folder / "data")):
            comparison.run(repeats, 0)
            typer.echo(comparison.markdown())


if __name__ == "__main__":
    try:
        typer.run(main)
    except ResmolError as error:
        sys.exit(f"error: {error.what}\n  fix: {error.fix}")
