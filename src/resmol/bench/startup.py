"""`resmol bench start`: how long until the help page is there, and until a new run has made its first step."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from resmol.bench.comparison import MEMORY, Comparison, Quantity, variants
from resmol.bench.machine import machine_facts
from resmol.bench.subprocess_runs import QUIET, Finished, run_process, run_training
from resmol.bench.workers.main import Metrics
from resmol.config.run_config import RunConfig
from resmol.errors import CheckFailed, UsageError
from resmol.run.ledger import effective_steps

SECONDS = Quantity("seconds", "seconds", ".2f")


@dataclass(frozen=True)
class StartBench:
    """What to start: the configuration of a new run, and the number of rounds."""

    config: RunConfig
    repeats: int = 5

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise UsageError(f"--repeats is {self.repeats}", fix="give at least 1")


def starting_contests(wanted: StartBench, folder: Path, data: str) -> list[Comparison]:
    """Return the contests of the help page and of the first step of a run on prepared ``data``, ready to run."""
    config = wanted.config.replace(QUIET)
    facts = machine_facts(config.runtime.threads)

    def help_page() -> Metrics:
        return command(["-m", "resmol", "--help"])

    def interpreter() -> Metrics:
        return command(["-c", "pass"])

    def first_step() -> Metrics:
        return time_to_first_step(config, folder, data)

    def library() -> Metrics:
        return command(["-c", "import torch"])

    return [
        Comparison(
            title="resmol --help",
            metric=SECONDS,
            columns=(MEMORY,),
            more_is_better=False,
            variants_=variants(help_page, {}, ("limit: an interpreter that does nothing", interpreter)),
            facts=facts,
        ),
        Comparison(
            title=f"from the start of the process to the end of the first step of {config.name}",
            metric=SECONDS,
            columns=(MEMORY,),
            more_is_better=False,
            variants_=variants(first_step, {}, ("limit: importing PyTorch", library)),
            facts=facts,
        ),
    ]


def command(arguments: Sequence[str]) -> Metrics:
    """Run the interpreter and return its time and memory (`CheckFailed` when it fails)."""
    done = run_process([sys.executable, *arguments])
    _require_success(done)
    return {"seconds": done.seconds, "peak_bytes": done.peak_bytes}


def time_to_first_step(config: RunConfig, folder: Path, data: str) -> Metrics:
    """Train one step as `resmol train` does; the ledger says when it was done (`CheckFailed` when it was not)."""
    started = time.time()  # the ledger has the time of day
    done, records = run_training(config, folder, data, steps=1)
    _require_success(done)
    stepped = datetime.fromisoformat(effective_steps(records)[1]["time"]).timestamp()
    return {"seconds": stepped - started, "peak_bytes": done.peak_bytes}


def _require_success(done: Finished) -> None:
    if done.code:
        raise CheckFailed(f"a measured process failed: {done.error_tail}", fix="correct the configuration")
