"""`resmol bench train`: a training step of ours, of transformers.Trainer, and of an ideal machine."""

from __future__ import annotations

import logging
import re
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from resmol.bench.comparison import MEMORY, Comparison, Quantity, variants
from resmol.bench.machine import machine_facts, require_peer
from resmol.bench.run_worker import run_worker
from resmol.bench.subprocess_runs import measure_training
from resmol.bench.workers.main import Metrics
from resmol.config.load import parse_overrides
from resmol.config.run_config import RunConfig
from resmol.data.shards import open_dataset
from resmol.errors import UsageError
from resmol.model.flops import total_parameters, training_flops_per_token
from resmol.run.checkpoint import weight_tensors
from resmol.system.host import allocator_environment
from resmol.train.autotune import resolve_auto
from resmol.train.build import make_loader, new_state
from resmol.train.parallel import Runtime

logger = logging.getLogger(__name__)

# The same arithmetic on both sides: Trainer's constant rate from the first step, and its decay, which spares the norms.
COMPARABLE = {
    "schedule.kind": "constant",
    "schedule.warmup_steps": 0,
    "optimizer.lr": 1e-4,
    "optimizer.decay": "matrices",
}
PEERS = ("transformers",)
SPEED = Quantity("tokens_per_second", "tokens/s")
LOSS = Quantity("mean_loss", "mean loss", ".4f")


@dataclass(frozen=True)
class TrainBench:
    """What to compare.

    Attributes:
        config: The configuration, before the batch and `COMPARABLE` are laid over it.
        overrides: ``key=value`` of the user, laid over everything.
        batches: (windows, tokens in each) of a step; each is a comparison of its own.
        precision: ``float32`` or ``bfloat16``.
        peer: ``transformers``, or None to measure only ours.
        repeats: Rounds.
        steps: Steps that are timed.
        warmup: Steps before them.
        seed: Of the order within the rounds.
    """

    config: RunConfig
    overrides: tuple[str, ...] = ()
    batches: tuple[tuple[int, int], ...] = ()
    precision: str = "float32"
    peer: str | None = None
    repeats: int = 5
    steps: int = 8
    warmup: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("steps", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} is {getattr(self, name)}", fix=f"give at least {least}")
        if self.precision not in ("float32", "bfloat16"):
            raise UsageError(f"--precision is {self.precision!r}", fix="choose float32 or bfloat16")
        require_peer(self.peer, PEERS, ("transformers", "accelerate"))

    def configurations(self) -> list[RunConfig]:
        """Return the configuration of each batch.

        Raises:
            ConfigError: A batch does not fit the model, or an override does not.
        """
        usual = (self.config.batch.micro_batch_size, self.config.data.seq_len)
        return [
            self.config.replace(
                {
                    **COMPARABLE,
                    "runtime.precision": self.precision,
                    "data.seq_len": length,
                    "batch.micro_batch_size": rows,
                    "batch.global_batch_tokens": rows * length,
                    **parse_overrides(self.overrides),
                }
            )
            for rows, length in self.batches or (usual,)
        ]


def parse_batch(text: str) -> tuple[int, int]:
    """Return the (windows, tokens) of ``2x512``.

    Raises:
        UsageError: It is written differently.
    """
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,6})", text.strip())
    if found is None:
        raise UsageError(f"--batch {text!r} is no batch", fix="write windows x tokens, e.g. --batch 2x512")
    return int(found[1]), int(found[2])


def training_contests(wanted: TrainBench, folder: Path, data: str) -> list[Comparison]:
    """Return a comparison for each batch, ready to run.

    Args:
        wanted: What to compare.
        folder: For the files of the processes.
        data: A prepared folder.
    """
    contests = []
    for number, config in enumerate(wanted.configurations()):
        settled, choices = resolve_auto(config)  # once, for the length of the real run, not for the steps measured
        for sentence in choices:
            logger.info(sentence)
        own = folder / f"batch-{number}"
        own.mkdir()
        contests.append(_contest(wanted, settled, own, data))
    return contests


def _contest(wanted: TrainBench, config: RunConfig, folder: Path, data: str) -> Comparison:
    rows, length = config.batch.micro_batch_size, config.data.seq_len

    def ours() -> Metrics:
        return asdict(measure_training(config, folder, data, wanted.steps, wanted.warmup))

    def limit() -> Metrics:
        return run_worker("resmol.bench.workers.roofline", limit_task(config), folder, allocator_environment({}))

    peers = {}
    if wanted.peer:
        peers = trainers(wanted, config, folder, shared_inputs(config, folder, data, wanted.warmup + wanted.steps))
    return Comparison(
        title=f"training {config.name}, {rows} x {length} tokens a step, {config.runtime.precision}",
        metric=SPEED,
        columns=(MEMORY, LOSS),
        variants_=variants(ours, peers, ("limit: matrix products only", limit)),
        facts=training_facts(config, wanted),
        notes=training_notes,
    )


def trainers(
    wanted: TrainBench, config: RunConfig, folder: Path, files: dict[str, str]
) -> dict[str, Callable[[], Metrics]]:
    """Return what measures transformers.Trainer as it is, and tuned as well as we know how."""

    def peer(*, tuned: bool) -> Metrics:
        task = {
            **files,
            "model": config.model.to_hf(),
            "rows": config.batch.micro_batch_size,
            "seq_len": config.data.seq_len,
            "steps": wanted.warmup + wanted.steps,
            "warmup": wanted.warmup,
            "optimizer": config.optimizer.model_dump(),
            "precision": config.runtime.precision,
            "device": config.runtime.device,
            "threads": config.runtime.threads,
            "tuned": tuned,
        }
        environment = allocator_environment({}) if tuned else {}
        return run_worker("resmol.bench.workers.train_transformers", task, folder, environment)

    return {
        "transformers.Trainer": lambda: peer(tuned=False),
        "transformers.Trainer, tuned": lambda: peer(tuned=True),
    }


def shared_inputs(config: RunConfig, folder: Path, data: str, steps: int) -> dict[str, str]:
    """Write our initial weights, and the windows of the first steps in our order; return the two paths."""
    files = {"weights": folder / "weights.safetensors", "windows": folder / "windows.safetensors"}
    state = new_state(config, Runtime(0, 1, torch.device("cpu"), None))
    save_file({name: tensor.contiguous() for name, tensor in weight_tensors(state.model).items()}, files["weights"])
    loader = make_loader(config, open_dataset(Path(data)).train)
    batches = [batch for step in range(1, steps + 1) for batch in loader.micro_batches(step)]
    windows = {
        "input_ids": torch.cat([batch.input_ids for batch in batches]),
        "targets": torch.cat([batch.targets for batch in batches]),
    }
    save_file(windows, files["windows"])
    return {name: str(path) for name, path in files.items()}


def limit_task(config: RunConfig) -> dict[str, Any]:
    """Return what the process that measures the limit is asked for."""
    return {
        "of": "training",
        "model": config.model.model_dump(),
        "rows": config.batch.micro_batch_size,
        "seq_len": config.data.seq_len,
        "precision": config.runtime.precision,
        "threads": config.runtime.threads,
    }


def training_facts(config: RunConfig, wanted: TrainBench) -> dict[str, Any]:
    """Return the machine, the versions and the sizes that the numbers belong to."""
    return {
        **machine_facts(config.runtime.threads),
        "device": config.runtime.device,
        "parameters": total_parameters(config.model),
        "compile": config.runtime.compile,
        "timed_steps": wanted.steps,
        "warmup_steps": wanted.warmup,
        "flops_per_token": training_flops_per_token(config.model, config.data.seq_len),
    }


def training_notes(comparison: Comparison) -> list[str]:
    """Say what the limit is made of, and whether the losses agree."""
    notes = []
    if limit := comparison.of_kind("limit"):
        rate, both = (statistics.median(limit.values(key)) for key in ("flops_per_second", "with_update"))
        update = statistics.median(limit.values("update_bytes_per_second"))
        ours = statistics.median(comparison.variants_[0].values(SPEED.key))
        notes.append(
            f"The products alone run at {rate / 1e9:,.0f} GFLOP/s. With AdamW's traffic at {update / 1e9:.1f} GB/s an "
            f"ideal step would reach {both:,.0f} tokens/s, of which resmol has {100 * ours / both:.0f} %."
        )
    losses = {one.name: one.values(LOSS.key)[0] for one in comparison.variants_ if one.values(LOSS.key)}
    if len(losses) > 1:
        spread = max(losses.values()) - min(losses.values())
        notes.append(f"From the same weights on the same windows, the mean losses differ by {spread:.1e} at most.")
    return notes
