"""Measured processes: training runs in `resmol train`, everything else in a worker.

Nothing is shared between two measurements, and each process reports its own peak memory when it ends.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from resmol.bench.workers.main import Metrics
from resmol.config.run_config import RunConfig
from resmol.data.resolve import Text, is_prepared, prepare_text
from resmol.data.tokenizer import load_tokenizer
from resmol.errors import CheckFailed
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, effective_steps, read_ledger
from resmol.system.processes import kill_group, limit_private_memory, start_apart
from resmol.system.signals import stop_signals_interrupt
from resmol.system.user_paths import user_path

QUIET = {"evaluation.every": 0, "sampling.every": 0, "checkpoint.every": 0}


@dataclass(frozen=True)
class Finished:
    """A process that has ended.

    Attributes:
        seconds: Wall-clock time from its start to its end.
        code: The exit code; negative is the signal that killed it.
        stdout: Its standard output.
        stderr: Its standard error.
        timed_out: Whether it was killed because it exceeded its time.
    """

    seconds: float
    code: int
    stdout: str
    stderr: str
    timed_out: bool = False

    @property
    def error_tail(self) -> str:
        """The last lines of its standard error, for an error message."""
        return " ".join(self.stderr.strip().splitlines()[-2:])[-500:] or f"it ended with code {self.code}"

    def require_success(self) -> None:
        """Raise `CheckFailed` with the last lines of its standard error if it failed."""
        if self.code:
            raise CheckFailed(f"a measured process failed: {self.error_tail}", fix="correct its configuration")


@dataclass(frozen=True)
class TrainingRun:
    """A `resmol train` process that has ended, and the records of its ledger."""

    process: Finished
    records: list[Record]

    def metrics(self, warmup: int) -> Metrics:
        """Return speed, peak memory and loss of a run that succeeded.

        Args:
            warmup: Steps at the beginning that are not timed.
        """
        steps = list(effective_steps(self.records).values())
        timed = steps[warmup:]
        return {
            "tokens_per_second": sum(step["tokens"] for step in timed) / sum(step["seconds"] for step in timed),
            "step_seconds": [step["seconds"] for step in timed],
            "loss": steps[-1]["loss"],
            "loss_bits": steps[-1]["loss_bits"],
            "mean_loss": sum(step["loss"] for step in steps) / len(steps),
            "peak_bytes": self.peak_bytes,
        }

    @property
    def peak_bytes(self) -> int:
        """The peak memory that the process reported; that of its accelerator, if it used one."""
        said = json.loads(self.process.stdout)
        return int(said.get("peak_device_memory_bytes") or said["peak_memory_bytes"])


def run_process(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
    memory_bytes: int | None = None,
) -> Finished:
    """Run a process to its end, or to that of this one: a signal that ends the wait ends the process first.

    Args:
        command: The program and its arguments.
        environment: Variables to set besides this process's own.
        seconds: Kill the process group after this time.
        memory_bytes: The most private memory that the process may hold (``RLIMIT_DATA``, Linux only). An allocation
            beyond it fails inside the process, so the kernel does not have to kill one.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, stop_signals_interrupt():
        started, timed_out = time.perf_counter(), False
        process = start_apart(command, stdout=out, stderr=err, env={**os.environ, **(environment or {})})
        try:
            if memory_bytes:
                limit_private_memory(process, memory_bytes)
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:  # also after Ctrl-C or SIGTERM: no measured process outlives its measurement
            if process.poll() is None:
                kill_group(process)
        took = time.perf_counter() - started
        return Finished(took, process.returncode, _text(out), _text(err), timed_out)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def run_worker(
    module: str, task: Mapping[str, Any], folder: Path, environment: Mapping[str, str] | None = None
) -> Metrics:
    """Run ``python -m module`` on a task and return its metrics.

    Args:
        module: A module that ends with `worker_main`.
        task: Its task; JSON.
        folder: For the files of the task and the result.
        environment: Variables to set besides this process's own.

    Raises:
        CheckFailed: It failed, or wrote no result.
    """
    given, result = folder / "task.json", folder / "result.json"
    given.write_text(json.dumps(task), encoding="utf-8", newline="\n")
    result.unlink(missing_ok=True)
    done = run_process([sys.executable, "-m", module, str(given), str(result)], environment=environment)
    if done.code or not result.is_file():
        raise CheckFailed(
            f"{module} failed: {done.error_tail}", fix="see its message; a baseline can be left out of the comparison"
        )
    metrics: Metrics = json.loads(result.read_text(encoding="utf-8"))
    return metrics


def run_training(
    config: RunConfig,
    folder: Path,
    data: str,
    steps: int,
    *,
    seconds: float | None = None,
    memory_bytes: int | None = None,
) -> TrainingRun:
    """Train by `resmol train` in a process of its own.

    Args:
        config: What to train.
        folder: Gets ``run`` (replaced if it exists) and ``config.toml``.
        data: A prepared folder.
        steps: The step to stop after.
        seconds: As for `run_process`.
        memory_bytes: As for `run_process`.
    """
    run = RunDir(folder / "run")
    shutil.rmtree(run.path, ignore_errors=True)
    file = folder / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8", newline="\n")
    command = [sys.executable, "-m", "resmol", "train", str(run.path), "--config", str(file), "--data", data]
    done = run_process([*command, "--steps", str(steps), "--json"], seconds=seconds, memory_bytes=memory_bytes)
    return TrainingRun(done, read_ledger(run.ledger).records if run.ledger.is_file() else [])


def measure_training(config: RunConfig, folder: Path, data: str, steps: int, warmup: int) -> Metrics:
    """Train without evaluation, samples and periodic checkpoints, and return speed, peak memory and loss.

    Args:
        config: What to train.
        folder: For the files of the run.
        data: A prepared folder.
        steps: Timed steps.
        warmup: Steps before them.

    Raises:
        CheckFailed: The process failed; the message has its last lines.
    """
    run = run_training(config.replace(QUIET), folder, data, warmup + steps)
    run.process.require_success()
    return run.metrics(warmup)


def prepared_folder(data: str | None, config: RunConfig, own: Path) -> str:
    """Return a prepared folder: ``data`` itself, or ``own`` with the tokens of the text ``data`` (None: Shakespeare).

    Raises:
        DataError: The text or the tokenizer is missing or unusable.
    """
    if data is not None and is_prepared(user_path(data)):
        return str(user_path(data).resolve())
    text = Text(inputs=(data,)) if data is not None else Text(corpus="shakespeare")
    prepare_text(own, text, load_tokenizer(None, sha256=config.tokenizer.sha256))
    return str(own)
