"""Experiment trackers: TensorBoard, Weights & Biases and Trackio draw the curves that the ledger records.

Each is an extra, each is asked for by its field under ``logging``, and a run keeps one curve however often it is
resumed: TensorBoard is told which steps are taken back, the others know the run again by the sha256 of the first line
of its ledger. Of the configuration they get what the numbers depend on: no path of this machine, and no prompt, which
may be words of a private text. What a tracker raises is a `TrackerError`, with which `RunLog` disables it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from resmol.config.run_config import RunConfig
from resmol.errors import UsageError
from resmol.run.directory import RunDir
from resmol.run.ledger import Record
from resmol.system.installation import install_hint

ID_DIGITS = 16  # of the sha256; W&B takes up to 128 characters
REASON_CHARACTERS = 200  # of what a tracker says when it fails
LOGIN_SECONDS = 30  # to reach the server of W&B; its own default is 90


class TrackerError(OSError):
    """A tracker failed; training goes on without it."""


@runtime_checkable
class Tracker(Protocol):
    """A library that draws curves, between its start and its end."""

    def open(self, first_step: int) -> None:
        """Start, or go on with the curve of a run that was resumed: values from ``first_step`` on follow."""

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Add one point to each curve."""

    def close(self) -> None:
        """Write what is buffered."""


class TensorBoard:
    """Event files in ``RUN/tensorboard``."""

    def __init__(self, run: RunDir, _config: RunConfig) -> None:
        self._folder = str(run.path / "tensorboard")
        self._writer: Any = None

    def open(self, first_step: int) -> None:
        """Open a new event file, which takes back what others hold from ``first_step`` on."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=first_step)

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Add one event for each value."""
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases. ``WANDB_MODE=offline`` keeps it in ``RUN/wandb`` until ``wandb sync`` sends it."""

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        self._directory, self._config = run, config
        self._run: Any = None

    def open(self, _first_step: int) -> None:
        """Start the run, or find it again by its id."""
        import wandb

        self._run = wandb.init(
            project=self._config.logging.project,
            id=run_id(self._directory.ledger),
            name=self._directory.path.resolve().name,
            resume="allow",
            dir=self._directory.path,
            config=self._config.bound_fields(),
            settings=wandb.Settings(silent=True, console="off", init_timeout=LOGIN_SECONDS),
        )
        # An own axis: W&B would drop the steps that a crash took back and that are executed again.
        self._run.define_metric("*", step_metric="step")

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Queue the values; W&B sends them in the background."""
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        """Finish the run, so that it can be resumed."""
        self._run.finish()


class Trackio:
    """A run in Trackio's own database, which ``trackio show`` draws."""

    def __init__(self, run: RunDir, config: RunConfig) -> None:
        self._directory, self._config = run, config
        self._run: Any = None

    def open(self, _first_step: int) -> None:
        """Start the run, or find it again by its name."""
        import trackio

        with _silent():
            self._run = trackio.init(
                project=self._config.logging.project,
                name=f"{self._directory.path.resolve().name}-{run_id(self._directory.ledger)[:6]}",
                resume="allow",
                config=self._config.bound_fields(),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, scalars: dict[str, float], step: int) -> None:
        """Queue the values."""
        self._run.log(scalars, step=step)

    def close(self) -> None:
        """Write what is queued."""
        import trackio

        with _silent():
            trackio.finish()  # not the run's own: the module would finish it again as the program ends, aloud


class TrackerWriter:
    """Shows the steps and evaluations of a run in one tracker, which is opened at the first of them."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name = name
        self._tracker = tracker
        self._is_open = False

    def show(self, record: Record) -> None:
        """Hand the record's numbers to the tracker; a resume or rewind starts it anew at the step that follows.

        Raises:
            TrackerError: The tracker raised something.
        """
        with self._own_errors():
            if record["kind"] in ("resume", "rewind"):
                self._close()
                self._open(record.get("next_step", record.get("to_step", 0) + 1))
            if scalars := scalars_of(record):
                self._open(record["step"])
                self._tracker.log(scalars, record["step"])

    def close(self) -> None:
        """Close the tracker.

        Raises:
            TrackerError: The tracker raised something.
        """
        with self._own_errors():
            self._close()

    def _open(self, first_step: int) -> None:
        if not self._is_open:
            self._tracker.open(first_step)
            self._is_open = True

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._tracker.close()

    @contextlib.contextmanager
    def _own_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise TrackerError(f"{type(error).__name__}: {error}".splitlines()[0][:REASON_CHARACTERS]) from error


_TRACKERS: dict[str, tuple[str, Callable[[RunDir, RunConfig], Tracker]]] = {  # by field: the module, and its writer
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", WandB),
    "trackio": ("trackio", Trackio),
}


def tracker_writers(run: RunDir, config: RunConfig) -> list[TrackerWriter]:
    """Return a writer for each tracker that the configuration asks for.

    Raises:
        UsageError: One of them is not installed.
    """
    wanted = [name for name in _TRACKERS if getattr(config.logging, name)]
    for name in wanted:
        module = _TRACKERS[name][0]
        if find_spec(module) is None:
            raise UsageError(
                f"logging.{name} needs {module}, which is not installed",
                fix=f"{install_hint(name)}, or --set logging.{name}=false",
            )
    return [TrackerWriter(name, _TRACKERS[name][1](run, config)) for name in wanted]


def run_id(ledger: Path) -> str:
    """Return what names a run for good: the first digits of the sha256 of the first line of its ledger."""
    with ledger.open("rb") as lines:
        return hashlib.sha256(lines.readline()).hexdigest()[:ID_DIGITS]


def scalars_of(record: Record) -> dict[str, float]:
    """Return the numbers of a step or an evaluation by the tags that curves have; nothing for another record."""
    if record["kind"] == "step":
        rate = {"perf/tokens_per_sec": record["tokens"] / record["seconds"]} if record["seconds"] else {}
        shown = ("loss", "grad_norm", "lr", "loss_scale")  # no norm in a step that was skipped
        return {f"train/{name}": record[name] for name in shown if record.get(name) is not None} | rate
    if record["kind"] == "eval":
        names = {"val/loss": "loss", "val/bpb": "bits_per_byte", "val/averaged_loss": "averaged_loss",
                 "val/averaged_bpb": "averaged_bits_per_byte"}  # fmt: skip
        return {tag: record[name] for tag, name in names.items() if name in record}
    return {}


def _silent() -> contextlib.AbstractContextManager[Any]:
    """Keep a library's words off the standard output, which belongs to our own."""
    return contextlib.redirect_stdout(io.StringIO())
