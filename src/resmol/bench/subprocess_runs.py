"""Measuring processes: each is one of its own, so that its peak memory is the kernel's figure and nothing is shared.

What is measured takes turns (A B C, C A B, ...), since a machine that slows down for a minute should slow all of them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from resmol.bench.paired_stats import interleaved
from resmol.config.run_config import RunConfig
from resmol.data.resolve import Text, is_prepared, prepare_text
from resmol.data.tokenizer import load_tokenizer
from resmol.errors import CheckFailed
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, effective_steps, read_ledger
from resmol.system.host import ALLOCATOR_VARIABLE

logger = logging.getLogger(__name__)

QUIET = {"evaluation.every": 0, "sampling.every": 0, "checkpoint.every": 0}
LAUNCHER = Path(__file__).with_name("workers") / "rusage_launcher.py"


@dataclass(frozen=True)
class Finished:
    """A process that ended by itself, or was ended.

    Attributes:
        seconds: From start to end, by the wall clock.
        peak_bytes: The most memory that was resident at once (``ru_maxrss`` of wait4); 0 when it was ended.
        code: The exit code; negative is the signal that ended it.
        said: Standard error.
        processor_seconds: What all its threads computed; far below its seconds, the machine was busy elsewhere.
        timed_out: Whether it was ended because its time was over.
    """

    seconds: float
    peak_bytes: int
    code: int
    said: str
    timed_out: bool = False
    processor_seconds: float = float("nan")

    @property
    def error_tail(self) -> str:
        """The last lines that it wrote, to say why it failed."""
        return " ".join(self.said.strip().splitlines()[-2:])[-500:] or f"it ended with code {self.code}"


@dataclass(frozen=True)
class Measurement:
    """One training process: its speed without saves, its peak memory, and the loss it came to."""

    tokens_per_second: float
    peak_bytes: int
    loss: float
    loss_bits: str
    mean_loss: float = float("nan")
    step_seconds: tuple[float, ...] = ()
    process_seconds: float = float("nan")
    processor_seconds: float = float("nan")


def run_process(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
    memory_bytes: int | None = None,
) -> Finished:
    """Run a process to its end and return what it took.

    Args:
        command: The program and its arguments; its standard output goes nowhere.
        environment: Variables to set besides this process's own, of which a tuned allocator is not inherited: a
            measured process gets it by its own doing, or by ``environment``.
        seconds: End it after this time.
        memory_bytes: The most private memory that it may ask the kernel for (RLIMIT_DATA). An allocation beyond it
            fails inside the process, which spares its neighbours the kernel's choice of a victim.
    """
    inherited = {name: value for name, value in os.environ.items() if name != ALLOCATOR_VARIABLE}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as words:
        report = Path(folder) / "report.json"
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(LAUNCHER), str(report), str(memory_bytes or 0), *command],
            stdout=subprocess.DEVNULL,
            stderr=words,
            env={**inherited, **(environment or {})},
            process_group=0,
        )
        timed_out = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:  # also when Ctrl-C came: nothing that is measured outlives its measurement
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        took = time.perf_counter() - started
        words.seek(0)
        said = words.read().decode(errors="replace")
        usage = json.loads(report.read_bytes()) if report.is_file() else {"code": -9, "peak_bytes": 0}
    computed = usage.get("processor_seconds", float("nan"))
    return Finished(took, usage["peak_bytes"], usage["code"], said, timed_out, computed)


def run_training(
    config: RunConfig,
    folder: Path,
    data: str,
    steps: int,
    *,
    seconds: float | None = None,
    memory_bytes: int | None = None,
) -> tuple[Finished, list[Record]]:
    """Train in a process of its own, as `resmol train` does; return what it took, and its ledger's records.

    Args:
        config: What to train; evaluation, samples and saves but the last are switched off only by the caller.
        folder: Gets ``run`` (replaced if it is there) and ``config.toml``.
        data: A prepared folder.
        steps: The step to stop after.
        seconds: End it after this time.
        memory_bytes: The most memory that it may use.
    """
    run = RunDir(folder / "run")
    shutil.rmtree(run.path, ignore_errors=True)
    file = folder / "config.toml"
    file.write_text(config.to_toml(), encoding="utf-8")
    command = [sys.executable, "-m", "resmol", "train", str(run.path), "--config", str(file), "--data", data]
    done = run_process([*command, "--steps", str(steps)], seconds=seconds, memory_bytes=memory_bytes)
    return done, read_ledger(run.ledger).records if run.ledger.is_file() else []


def measure_training(config: RunConfig, folder: Path, data: str, steps: int, warmup: int) -> Measurement:
    """Train in a process of its own and read speed and loss from the ledger.

    Args:
        config: What to train.
        folder: For its files.
        data: A prepared folder.
        steps: Steps that are timed.
        warmup: Steps before them.

    Raises:
        CheckFailed: The process failed; the message has its last lines.
    """
    done, records = run_training(config.replace(QUIET), folder, data, warmup + steps)
    if done.code:
        raise CheckFailed(f"a measured process failed: {done.error_tail}", fix="correct the variant")
    return training_measurement(done, records, warmup)


def training_measurement(done: Finished, records: list[Record], warmup: int) -> Measurement:
    """Return speed and loss of a training process, of which the first ``warmup`` steps are not timed."""
    steps = list(effective_steps(records).values())
    timed = steps[warmup:]
    return Measurement(
        tokens_per_second=sum(step["tokens"] for step in timed) / sum(step["seconds"] for step in timed),
        peak_bytes=done.peak_bytes,
        loss=steps[-1]["loss"],
        loss_bits=steps[-1]["loss_bits"],
        mean_loss=sum(step["loss"] for step in steps) / len(steps),
        step_seconds=tuple(step["seconds"] for step in timed),
        process_seconds=done.seconds,
        processor_seconds=done.processor_seconds,
    )


def take_turns(count: int, rounds: int, seed: int, measure: Callable[[int], str]) -> bool:
    """Measure each of ``count`` things once a round, in another order each round.

    Args:
        count: How many things there are.
        rounds: How many rounds.
        seed: Of the orders.
        measure: Takes the number of the thing and returns a sentence on it.

    Returns:
        Whether all of it was done; Ctrl-C ends it early.
    """
    total, started, done = count * rounds, time.monotonic(), 0
    try:
        for number, order in enumerate(interleaved(count, rounds, seed), 1):
            for index in order:
                sentence = measure(index)
                done += 1
                left = (time.monotonic() - started) / done * (total - done)
                logger.info(f"round {number} of {rounds}, {sentence}, about {left:.0f} s left")
    except KeyboardInterrupt:
        logger.info("interrupted: this is what was measured")
        return False
    return True


def prepared_folder(data: str | None, config: RunConfig, own: Path) -> str:
    """Return a prepared folder: ``data`` itself, or what is made in ``own`` of the text ``data`` (None: the plays)."""
    if data is not None and is_prepared(Path(data)):
        return str(Path(data).resolve())
    text = Text(inputs=(data,)) if data is not None else Text(corpus="shakespeare")
    prepare_text(own, text, load_tokenizer(None, sha256=config.tokenizer.sha256))
    return str(own)
