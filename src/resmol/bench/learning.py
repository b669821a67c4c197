"""How a run learned: the held-out loss on the way, against steps, tokens and seconds of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from resmol.bench.subprocess_runs import TrainingRun, run_training
from resmol.config.run_config import RunConfig
from resmol.config.strict_model import StrictModel
from resmol.run.ledger import effective_steps, select

HELD_OUT_TOKENS = 16_384  # as many as `resmol reproduce` evaluates on


class Point(StrictModel):
    """A held-out loss in nats per token and bits per byte, and what was spent until then.

    Of a run that averages its weights it is the loss of the average, for which it is kept. The seconds are those of the
    steps, without evaluation, samples and saves.
    """

    step: int
    tokens: int
    seconds: float
    loss: float
    bits_per_byte: float


Curve = tuple[Point, ...]
MeasureLearning = Callable[[RunConfig, Path, str], Curve]  # configuration, folder for its files, prepared data


def for_learning(config: RunConfig, steps: int, points: int) -> RunConfig:
    """Return a configuration of ``steps`` steps that evaluates on the way and neither samples nor saves before its end.

    Args:
        config: What to train.
        steps: How long.
        points: How often the held-out loss is measured on the way; each time costs seconds.
    """
    return config.replace(
        {
            "train.steps": steps,
            "evaluation.every": max(1, steps // points),
            "evaluation.windows": -(-HELD_OUT_TOKENS // config.data.seq_len),
            "sampling.every": 0,
            "checkpoint.every": 0,
            "checkpoint.permanent": [],
        }
    )


def measure_learning(config: RunConfig, folder: Path, data: str) -> Curve:
    """Train in a process of its own and return its curve.

    Args:
        config: What to train; see `for_learning`.
        folder: For the files of the run.
        data: A prepared folder.

    Raises:
        CheckFailed: The process failed; the message has its last lines.
    """
    run = run_training(config, folder, data, config.train.steps)
    run.process.require_success()
    return curve_of(run)


def curve_of(run: TrainingRun) -> Curve:
    """Return the held-out losses that a run recorded."""
    seconds, spent = 0.0, dict[int, tuple[int, float]]()
    for step, record in effective_steps(run.records).items():
        seconds += record["seconds"]
        spent[step] = (record["tokens_seen"], seconds)
    points = []
    for record in select(run.records, "eval"):
        tokens, taken = spent[record["step"]]
        measured = "averaged_" if "averaged_loss" in record else ""
        points.append(
            Point(
                step=record["step"],
                tokens=tokens,
                seconds=round(taken, 3),
                loss=record[f"{measured}loss"],
                bits_per_byte=record[f"{measured}bits_per_byte"],
            )
        )
    return tuple(points)
