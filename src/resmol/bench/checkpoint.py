"""`resmol bench checkpoint`: how long a save and a load take, against torch.save, safetensors and the bare disk.

Ours is what `resmol train` does: atomic, durable, every tensor and every file hashed, verified before it is believed.
The peers do none of this; they are the price of it.
"""

from __future__ import annotations

import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from resmol.bench.comparison import MEMORY, Comparison, Quantity, variants
from resmol.bench.machine import machine_facts
from resmol.bench.run_worker import run_worker
from resmol.bench.subprocess_runs import QUIET, run_training
from resmol.bench.workers.main import Metrics
from resmol.config.load import parse_overrides
from resmol.config.run_config import RunConfig
from resmol.errors import CheckFailed, UsageError
from resmol.model.flops import total_parameters
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, select

SAVE = Quantity("save_seconds", "save, s", ".2f")
STALLED = Quantity("stalled_seconds", "training stands still, s", ".2f")
LOAD = Quantity("load_seconds", "load, s", ".2f")
# Two short steps: the first save is one in the middle of a run, the second is that of its end.
SHORT = {
    **QUIET, "data.seq_len": 16, "batch.micro_batch_size": 1, "batch.global_batch_tokens": 16,
    "runtime.precision": "float32", "runtime.compile": "off", "checkpoint.every": 1,
}  # fmt: skip


@dataclass(frozen=True)
class CheckpointBench:
    """What to compare: a configuration whose model is saved, and the number of rounds."""

    config: RunConfig
    overrides: tuple[str, ...] = ()
    repeats: int = 5

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise UsageError(f"--repeats is {self.repeats}", fix="give at least 1")

    @property
    def settled(self) -> RunConfig:
        """The configuration of the short run."""
        return self.config.replace({**SHORT, **parse_overrides(self.overrides)})


def checkpoint_contest(wanted: CheckpointBench, folder: Path, data: str) -> Comparison:
    """Return the comparison, ready to run; all its files are below ``folder``, on whose disk it is held."""
    config = wanted.settled
    file, out = folder / "wanted.toml", folder / "peer"
    file.write_text(config.to_toml(), encoding="utf-8")
    size = 3 * 4 * total_parameters(config.model)

    def ours() -> Metrics:
        try:
            return _save_and_load(config, folder, file, data)
        finally:
            shutil.rmtree(folder / "run", ignore_errors=True)

    def other(who: str) -> Metrics:
        task = {"who": who, "config": str(file), "out": str(out), "bytes": size}
        try:
            return run_worker("resmol.bench.workers.checkpoint", task, folder)
        finally:
            out.unlink(missing_ok=True)

    return Comparison(
        title=f"a checkpoint of {config.name}, {size / 1e6:,.0f} MB of weights and moments",
        metric=SAVE,
        columns=(STALLED, LOAD, MEMORY),
        more_is_better=False,
        variants_=variants(
            ours,
            {
                "torch.save, fsync; torch.load": lambda: other("torch"),
                "safetensors, fsync; load_file": lambda: other("safetensors"),
            },
            ("limit: write and fsync; read", lambda: other("disk")),
        ),
        facts={**machine_facts(config.runtime.threads), "bytes": size},
        notes=checkpoint_notes,
    )


def _save_and_load(config: RunConfig, folder: Path, file: Path, data: str) -> Metrics:
    done, records = run_training(config, folder, data, steps=2)
    if done.code:
        raise CheckFailed(f"a measured process failed: {done.error_tail}", fix="correct the configuration")
    newest = max(RunDir(folder / "run").checkpoints.glob("step-*"))
    task = {"who": "ours", "config": str(file), "checkpoint": str(newest)}
    loaded = run_worker("resmol.bench.workers.checkpoint", task, folder)
    return {**saved(records), "load_seconds": loaded["load_seconds"], "peak_bytes": done.peak_bytes}


def saved(records: list[Record]) -> Metrics:
    """Return the times of the first save of a ledger; a save in the background says for how long training stood still.

    Raises:
        CheckFailed: Nothing was saved.
    """
    saves = list(select(records, "save"))
    if not saves:
        raise CheckFailed("the run saved nothing", fix="report this")
    first = saves[0]
    return {
        "save_seconds": first["seconds"],
        "stalled_seconds": first["stall_seconds"],
        "bytes": first["bytes"],
    }


def checkpoint_notes(comparison: Comparison) -> list[str]:
    """Say what the disk and the hash can do."""
    limit = comparison.of_kind("limit")
    if limit is None:
        return []
    write, sha = (statistics.median(limit.values(f"{key}_bytes_per_second")) for key in ("write", "sha256"))
    return [
        f"The disk takes {write / 1e6:,.0f} MB/s with fsync; one thread hashes {sha / 1e6:,.0f} MB/s. "
        "Files that were just written are read from memory, on all rows alike."
    ]
