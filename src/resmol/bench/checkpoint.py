"""`resmol bench checkpoint`: saving and loading, compared with torch.save, safetensors and the bare disk.

resmol does what `resmol train` does: an atomic, durable save in which every tensor and every file is hashed, and a
load that verifies them. The baselines do none of this, so the difference is its price.
"""

from __future__ import annotations

import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from resmol.bench.comparison import MEMORY, Comparison, Quantity, make_variants
from resmol.bench.machine import machine_facts
from resmol.bench.subprocess_runs import QUIET, run_training, run_worker
from resmol.bench.workers.main import Metrics
from resmol.config.load import parse_overrides
from resmol.config.run_config import RunConfig
from resmol.errors import CheckFailed, UsageError
from resmol.model.flops import total_parameters
from resmol.run.directory import RunDir
from resmol.run.ledger import Record, select

SAVE = Quantity("save_seconds", "save, s", ".2f")
STALL = Quantity("stall_seconds", "training stalls, s", ".2f")
LOAD = Quantity("load_seconds", "load, s", ".2f")
# Two short steps: the first save happens in the middle of a run, the second at its end.
SHORT = {
    **QUIET, "data.seq_len": 16, "batch.micro_batch_size": 1, "batch.global_batch_tokens": 16,
    "runtime.precision": "float32", "runtime.compile": "off", "checkpoint.every": 1,
}  # fmt: skip


@dataclass(frozen=True)
class CheckpointBench:
    """What to compare: a configuration whose model is saved, the user's ``key=value``, and the number of rounds."""

    config: RunConfig
    overrides: tuple[str, ...] = ()
    repeats: int = 5

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise UsageError(f"--repeats is {self.repeats}", fix="give at least 1")

    @property
    def short_config(self) -> RunConfig:
        """The configuration of the short run."""
        return self.config.replace({**SHORT, **parse_overrides(self.overrides)})


def checkpoint_comparison(bench: CheckpointBench, folder: Path, data: str) -> Comparison:
    """Return the comparison, ready to run.

    Args:
        bench: What to compare.
        folder: For all files; the disk that it is on is measured.
        data: A prepared folder.
    """
    config = bench.short_config
    file, out = folder / "bench.toml", folder / "baseline"
    file.write_text(config.to_toml(), encoding="utf-8", newline="\n")
    size = 3 * 4 * total_parameters(config.model)

    def resmol() -> Metrics:
        try:
            return _save_and_load(config, folder, file, data)
        finally:
            shutil.rmtree(folder / "run", ignore_errors=True)

    def other(role: str) -> Metrics:
        task = {"role": role, "config": str(file), "out": str(out), "bytes": size}
        try:
            return run_worker("resmol.bench.workers.checkpoint", task, folder)
        finally:
            out.unlink(missing_ok=True)

    return Comparison(
        title=f"a checkpoint of {config.name}, {size / 1e6:,.0f} MB of weights and moments",
        metric=SAVE,
        columns=(STALL, LOAD, MEMORY),
        more_is_better=False,
        variants=make_variants(
            resmol,
            {
                "torch.save, fsync; torch.load": lambda: other("torch"),
                "safetensors, fsync; load_file": lambda: other("safetensors"),
            },
            ("roofline: write and fsync; read", lambda: other("disk")),
        ),
        facts={**machine_facts(config.runtime.threads), "bytes": size},
        notes=checkpoint_notes,
    )


def _save_and_load(config: RunConfig, folder: Path, file: Path, data: str) -> Metrics:
    run = run_training(config, folder, data, steps=2)
    run.process.require_success()
    newest = max(RunDir(folder / "run").checkpoints.glob("step-*"))
    task = {"role": "resmol", "config": str(file), "checkpoint": str(newest)}
    loaded = run_worker("resmol.bench.workers.checkpoint", task, folder)
    return {**first_save(run.records), "load_seconds": loaded["load_seconds"], "peak_bytes": run.peak_bytes}


def first_save(records: list[Record]) -> Metrics:
    """Return the times of the first save of a ledger; training stalls for less than all of a save in the background.

    Raises:
        CheckFailed: Nothing was saved.
    """
    first = next(select(records, "save"), None)
    if first is None:
        raise CheckFailed("the run saved nothing", fix="report this as a bug")
    return {
        "save_seconds": first["seconds"],
        "stall_seconds": first["stall_seconds"],
        "bytes": first["bytes"],
    }


def checkpoint_notes(comparison: Comparison) -> list[str]:
    """Describe the speeds of the disk and of the hash."""
    roofline = comparison.of_kind("roofline")
    if roofline is None:
        return []
    write, sha = (statistics.median(roofline.values(f"{key}_bytes_per_second")) for key in ("write", "sha256"))
    return [
        f"The disk writes {write / 1e6:,.0f} MB/s with fsync; one thread hashes {sha / 1e6:,.0f} MB/s. "
        "Files that were just written are read from memory, in all rows alike."
    ]
