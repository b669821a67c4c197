"""`resmol bench train`: training steps of resmol, of transformers.Trainer, and at the roofline."""

from __future__ import annotations

import logging
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from resmol.bench.comparison import MEMORY, SPEED, Comparison, Quantity, make_variants
from resmol.bench.machine import machine_facts, require_baseline, require_precision
from resmol.bench.subprocess_runs import measure_training, run_worker
from resmol.bench.workers.main import Metrics
from resmol.config.load import parse_overrides
from resmol.config.run_config import RunConfig
from resmol.data.shards import open_dataset
from resmol.errors import UsageError
from resmol.model.flops import total_parameters, training_flops_per_token
from resmol.run.checkpoint import weight_tensors
from resmol.train.autotune import resolve_auto
from resmol.train.build import make_loader, new_state
from resmol.train.parallel import Runtime

logger = logging.getLogger(__name__)

# What the Trainer computes: one constant learning rate from the first step, and weight decay that spares the norms.
COMPARABLE = {
    "schedule.kind": "constant", "schedule.warmup_steps": 0, "optimizer.lr": 1e-4,
    "optimizer.embedding_lr_scale": 1.0, "optimizer.decay": "matrices",
}  # fmt: skip
BASELINES = {"transformers": ("transformers", "accelerate")}
LOSS = Quantity("mean_loss", "mean loss", ".4f")


@dataclass(frozen=True)
class TrainBench:
    """What to compare.

    Attributes:
        config: The configuration, before the batch and `COMPARABLE` are laid over it.
        overrides: ``key=value`` of the user, laid over everything.
        batches: (windows, tokens in each) of a step; each is a comparison of its own.
        precision: ``float32`` or ``bfloat16``.
        baseline: ``transformers``, or None to measure resmol alone.
        repeats: Rounds.
        steps: Timed steps of a measurement.
        warmup: Steps before them.
    """

    config: RunConfig
    overrides: tuple[str, ...] = ()
    batches: tuple[tuple[int, int], ...] = ()
    precision: str = "float32"
    baseline: str | None = None
    repeats: int = 5
    steps: int = 8
    warmup: int = 3

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("steps", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} is {getattr(self, name)}", fix=f"give at least {least}")
        require_precision(self.precision)
        require_baseline(self.baseline, BASELINES)

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


def training_comparisons(bench: TrainBench, folder: Path, data: str) -> list[Comparison]:
    """Return a comparison for each batch, ready to run.

    Args:
        bench: What to compare.
        folder: For the files of the processes.
        data: A prepared folder.
    """
    comparisons = []
    for number, config in enumerate(bench.configurations()):
        resolved, choices = resolve_auto(config)  # once, for the length of the real run, not for the steps measured
        for sentence in choices:
            logger.info(sentence)
        own = folder / f"batch-{number}"
        own.mkdir()
        comparisons.append(_comparison(bench, resolved, own, data))
    return comparisons


def _comparison(bench: TrainBench, config: RunConfig, folder: Path, data: str) -> Comparison:
    rows, length = config.batch.micro_batch_size, config.data.seq_len

    def resmol() -> Metrics:
        return measure_training(config, folder, data, bench.steps, bench.warmup)

    def roofline() -> Metrics:
        return run_worker("resmol.bench.workers.roofline", {**roofline_task(config), "keep_freed_memory": True}, folder)

    baselines = {}
    if bench.baseline:
        inputs = shared_inputs(config, folder, data, bench.warmup + bench.steps)
        baselines = trainer_measurements(bench, config, folder, inputs)
    return Comparison(
        title=f"training {config.name}, {rows} x {length} tokens a step, {config.runtime.precision}",
        metric=SPEED,
        columns=(MEMORY, LOSS),
        variants=make_variants(resmol, baselines, ("roofline: matmuls only", roofline)),
        facts=training_facts(config, bench),
        notes=training_notes,
    )


def trainer_measurements(
    bench: TrainBench, config: RunConfig, folder: Path, inputs: dict[str, str]
) -> dict[str, Callable[[], Metrics]]:
    """Return functions that measure transformers.Trainer, as it is and tuned.

    Args:
        bench: What to compare.
        config: The resolved configuration.
        folder: For the files of the processes.
        inputs: The files of `shared_inputs`.
    """

    def trainer(*, tuned: bool) -> Metrics:
        task = {
            **inputs,
            "model": config.model.to_hf(),
            "rows": config.batch.micro_batch_size,
            "seq_len": config.data.seq_len,
            "lr_scheduler": "constant",
            "steps": bench.warmup + bench.steps,
            "warmup": bench.warmup,
            "optimizer": {
                **config.optimizer.model_dump(),
                "beta2": config.optimizer.beta2_at(config.batch.global_batch_tokens),
            },
            "precision": config.runtime.precision,
            "device": config.runtime.device,
            "threads": config.runtime.threads,
            "tuned": tuned,
            "keep_freed_memory": tuned,
        }
        return run_worker("resmol.bench.workers.train_transformers", task, folder)

    return {
        "transformers.Trainer": lambda: trainer(tuned=False),
        "transformers.Trainer, tuned": lambda: trainer(tuned=True),
    }


def shared_inputs(config: RunConfig, folder: Path, data: str, steps: int) -> dict[str, str]:
    """Write our initial weights, and the windows of the first steps in our order; return the two paths."""
    files = {"weights": folder / "weights.safetensors", "windows": folder / "windows.safetensors"}
    state = new_state(config, Runtime.single())
    save_file({name: tensor.contiguous() for name, tensor in weight_tensors(state.model).items()}, files["weights"])
    loader = make_loader(config, open_dataset(Path(data)).train)
    seen = range(0, steps * loader.windows_per_step, loader.windows_per_step)
    batches = [batch for windows_seen in seen for batch in loader.step_after(windows_seen).batches]
    windows = {
        "input_ids": torch.cat([batch.input_ids for batch in batches]),
        "targets": torch.cat([batch.targets for batch in batches]),
    }
    save_file(windows, files["windows"])
    return {name: str(path) for name, path in files.items()}


def roofline_task(config: RunConfig) -> dict[str, Any]:
    """Return the task of the worker that measures the roofline of a training step."""
    return {
        "of": "training",
        "model": config.model.model_dump(),
        "rows": config.batch.micro_batch_size,
        "seq_len": config.data.seq_len,
        "precision": config.runtime.precision,
        "threads": config.runtime.threads,
        "device": config.runtime.device,
    }


def training_facts(config: RunConfig, bench: TrainBench) -> dict[str, Any]:
    """Return the machine, the versions and the sizes that the numbers belong to."""
    return {
        **machine_facts(config.runtime.threads),
        "device": config.runtime.device,
        "parameters": total_parameters(config.model),
        "compile": config.runtime.compile,
        "timed_steps": bench.steps,
        "warmup_steps": bench.warmup,
        "flops_per_token": training_flops_per_token(config.model, config.data.seq_len),
    }


def training_notes(comparison: Comparison) -> list[str]:
    """Describe the roofline, and how far the losses agree."""
    notes = []
    if roofline := comparison.of_kind("roofline"):
        rate, both = (statistics.median(roofline.values(key)) for key in ("flops_per_second", "with_update"))
        update = statistics.median(roofline.values("update_bytes_per_second"))
        ours = statistics.median(comparison.reference.values(SPEED.key))
        notes.append(
            f"The matmuls alone run at {rate / 1e9:,.0f} GFLOP/s. With AdamW's traffic at {update / 1e9:.1f} GB/s an "
            f"ideal step would reach {both:,.0f} tokens/s, of which resmol has {100 * ours / both:.0f} %."
        )
    losses = {one.name: one.values(LOSS.key)[0] for one in comparison.variants if one.values(LOSS.key)}
    if len(losses) > 1:
        spread = max(losses.values()) - min(losses.values())
        notes.append(f"From the same weights on the same windows, the mean losses differ by {spread:.1e} at most.")
    return notes
