"""`resmol bench learn`: time to quality, ours and that of transformers.Trainer.

Both train the same model from the same weights on the same windows, each with its own recipe, and are measured on the
same held-out text. The question is not who makes more steps a second, but after how many seconds we are where the
Trainer ends. Three learners take part: resmol as configured; the Trainer with its defaults and the usual learning rate;
and, since nobody has to keep a default, the Trainer with the best learning rate of a small sweep over the first seed.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from safetensors.torch import save_file

from resmol.bench.comparison import markdown_table
from resmol.bench.learning import Curve, Point, for_learning, measure_learning
from resmol.bench.learning_record import LearningRecord, open_study
from resmol.bench.machine import require_baseline
from resmol.bench.paired_stats import Ratio, mean_interval, paired_ratio
from resmol.bench.subprocess_runs import run_worker
from resmol.bench.train import BASELINES, shared_inputs
from resmol.config.load import with_overrides
from resmol.config.run_config import RunConfig
from resmol.data.shards import open_dataset
from resmol.data.tokenizer import load_tokenizer
from resmol.errors import DataError, UsageError
from resmol.model.cross_entropy import IGNORE_INDEX
from resmol.system.tables import text_table
from resmol.system.wording import counted
from resmol.train.build import make_loader
from resmol.train.lr_schedule import decay_over

logger = logging.getLogger(__name__)

RECORDS = Path("runs") / "learning"
OURS = "resmol"
USUAL_RATE, TUNED_RATES = 3e-4, (1e-3, 3e-3, 1e-2)
TRAINER_DEFAULTS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0}
TITLES = ("", "held-out bits per byte", "seconds of training", "resmol is there after", "times as fast")


@dataclass(frozen=True)
class LearnBench:
    """What to compare.

    Attributes:
        config: The configuration whose recipe is ours, and whose model and batch are everybody's.
        overrides: ``key=value`` of the user, laid over it.
        data: A prepared folder or text; None takes the plays of Shakespeare.
        seeds: How many seeds, from those of the configuration upwards.
        steps: Length of a run; None takes the step at which the planned decay ends, or ``train.steps``.
        record: The file of the finished runs; None takes one in `RECORDS` that the configuration determines.
        points: How often the held-out loss is measured in a run.
    """

    config: RunConfig
    overrides: tuple[str, ...] = ()
    data: str | None = None
    seeds: int = 3
    steps: int | None = None
    record: Path | None = None
    points: int = 20

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "points"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} is {value}", fix="give at least 1")
        require_baseline("transformers", BASELINES)

    def resolved(self) -> RunConfig:
        """Return our configuration for a run of this length: a planned decay keeps its share of the steps."""
        config = with_overrides(self.config, self.overrides)
        planned = config.schedule.decay_start + config.schedule.decay_steps
        steps = self.steps or planned or config.train.steps
        if planned and planned != steps:
            start, length = decay_over(config.schedule, steps)
            if length <= 0:
                raise UsageError(f"--steps {steps} ends within the warm-up ({start} steps)", fix="give more")
            config = config.replace({"schedule.decay_start": start, "schedule.decay_steps": length})
        return for_learning(config, steps, self.points)


def trainer_name(rate: float) -> str:
    """Return the name of the Trainer with a learning rate."""
    return f"transformers.Trainer, lr {rate:g}"


class LearnResult:
    """The runs so far, and what they say."""

    def __init__(self, bench: LearnBench, config: RunConfig, record: LearningRecord) -> None:
        self.bench, self.config, self.record = bench, config, record

    @property
    def seeds(self) -> range:
        """The seeds."""
        return range(self.config.train.seed, self.config.train.seed + self.bench.seeds)

    def learners(self, seed: int) -> list[str]:
        """Return who trains with a seed: with the first one every candidate of the sweep, then the best of them."""
        tuned = [trainer_name(rate) for rate in TUNED_RATES]
        chosen = tuned if seed == self.seeds[0] else [name for name in (self.tuned,) if name]
        return [OURS, trainer_name(USUAL_RATE), *chosen]

    @property
    def tuned(self) -> str | None:
        """The Trainer with the best learning rate of the sweep; None before the sweep is done."""
        first = range(self.seeds[0], self.seeds[0] + 1)
        ends = {name: self.record.ends((name,), first) for name in map(trainer_name, TUNED_RATES)}
        if any(self.record.find((name,), self.seeds[0]) is None for name in ends):
            return None
        done = {name: found[self.seeds[0]].bits_per_byte for name, found in ends.items() if found}
        return min(done, key=lambda name: done[name]) if done else None

    def next_run(self) -> tuple[str, int] | None:
        """Return the learner and the seed of the next run; None when all are done."""
        runs = ((name, seed) for seed in self.seeds for name in self.learners(seed))
        return next(((name, seed) for name, seed in runs if self.record.find((name,), seed) is None), None)

    def curve(self, name: str, seed: int) -> Curve:
        """Return a learner's curve; empty where there is none."""
        cell = self.record.find((name,), seed)
        return cell.curve if cell is not None else ()

    def reached(self, name: str) -> dict[int, tuple[float, float | None]]:
        """Return by seed after how many seconds a learner ends, and after how many we are where it ends."""
        found = {}
        for seed, end in self.record.ends((name,), self.seeds).items():
            if ours := self.curve(OURS, seed):
                found[seed] = (end.seconds, seconds_to_reach(ours, end.bits_per_byte))
        return found

    def ratio(self, name: str) -> Ratio | None:
        """Return how many times as fast we are where a learner ends; None if we are not there with every seed."""
        pairs = [(theirs, ours) for theirs, ours in self.reached(name).values() if ours]
        if not pairs or len(pairs) < len(self.reached(name)):
            return None
        return paired_ratio([theirs for theirs, _ in pairs], [ours for _, ours in pairs])

    def cells(self) -> list[list[str]]:
        """Return the rows of the table."""
        names = [OURS, trainer_name(USUAL_RATE), *([self.tuned] if self.tuned else [])]
        return [self._row(name) for name in names if self.record.ends((name,), self.seeds)]

    def _row(self, name: str) -> list[str]:
        ends = list(self.record.ends((name,), self.seeds).values())
        row = [
            name,
            mean_interval([end.bits_per_byte for end in ends]).show(),
            mean_interval([end.seconds for end in ends]).show(",.0f"),
        ]
        if name == OURS:
            return [*row, "", ""]
        times = [ours for _, ours in self.reached(name).values()]
        there = [seconds for seconds in times if seconds is not None]
        ratio = self.ratio(name)
        missed = f"not with {len(times) - len(there)} of {counted(len(times), 'seed')}"
        after = mean_interval(there).show(",.0f") if ratio else missed
        bounds = f" ({ratio.low:.2f} to {ratio.high:.2f})" if ratio and math.isfinite(ratio.high) else ""
        return [*row, after, f"{ratio.middle:.2f}x{bounds}" if ratio else ""]

    @property
    def heading(self) -> str:
        """What was trained, and how often."""
        seeds = counted(self.bench.seeds, "seed")
        rest = "" if self.next_run() is None else "; not finished"
        return f"learning with {self.config.name}, {self.config.train.steps:,} steps, {seeds}{rest}"

    def render(self, console: Console) -> None:
        """Print the table to a terminal."""
        table = text_table(self.heading, *TITLES)
        for row in self.cells():
            table.add_row(*map(escape, row))
        console.print(table)

    def markdown(self) -> str:
        """Return the table as Markdown, with the facts below it."""
        facts = "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.record.facts.items())
        return "\n".join([f"**{self.heading}**", "", *markdown_table(TITLES, self.cells()), "", facts, ""])

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON."""
        return {"title": self.heading, "complete": self.next_run() is None, **self.record.model_dump(mode="json")}


def seconds_to_reach(curve: Curve, bits_per_byte: float) -> float | None:
    """Return after how many seconds of training a curve is at a loss for the first time; None if it never is.

    Between two points it is taken as straight. If already the first point is below, its time is an upper bound.
    """
    before: Point | None = None
    for point in curve:
        if point.bits_per_byte <= bits_per_byte:
            if before is None:
                return point.seconds
            share = (before.bits_per_byte - bits_per_byte) / (before.bits_per_byte - point.bits_per_byte)
            return before.seconds + share * (point.seconds - before.seconds)
        before = point
    return None


def compare_learning(
    bench: LearnBench, learn: Callable[[str, RunConfig, Path, str], Curve] | None = None
) -> Iterator[LearnResult]:
    """Do the runs that the record does not have yet.

    Args:
        bench: What to compare.
        learn: Trains a learner, given its name, the configuration with the seed, a folder and prepared data.

    Yields:
        The result so far: before the first run, and after each one.

    Raises:
        ConfigError, UsageError: An override does not fit, or the record is that of something else.
        DataError: The record, the text or the tokenizer is missing or unusable, or nothing is held out.
    """
    with open_study(bench.resolved(), bench.data, bench.record, RECORDS) as study:
        result = LearnResult(bench, study.config, study.record)
        yield result
        while run := result.next_run():
            name, seed = run
            seeded = study.config.replace({"train.seed": seed, "data.seed": seed})
            train = partial(learn or learn_once, name, seeded, study.folder, study.data)
            result.record = result.record.with_run((name,), seed, train, study.file)
            logger.info(f"{name}, seed {seed}: {result.record.cells[-1].describe()}")
            yield result


def learn_once(name: str, config: RunConfig, folder: Path, data: str) -> Curve:
    """Train one learner in a process of its own and return its curve (`CheckFailed` when the process failed)."""
    if name == OURS:
        return measure_learning(config, folder, data)
    rate = next(rate for rate in (USUAL_RATE, *TUNED_RATES) if trainer_name(rate) == name)
    metrics = run_worker("resmol.bench.workers.learn_transformers", trainer_task(config, rate, folder, data), folder)
    return tuple(Point.model_validate_json(json.dumps(point)) for point in metrics["curve"])


def trainer_task(config: RunConfig, rate: float, folder: Path, data: str) -> dict[str, Any]:
    """Return the task of the Trainer's worker: our model, weights and windows, its defaults and a learning rate."""
    return {
        **shared_inputs(config, folder, data, config.train.steps),
        **held_out_inputs(config, folder, data),
        "model": config.model.to_hf(),
        "rows": config.windows_per_step,
        "step_tokens": config.batch.global_batch_tokens,
        "steps": config.train.steps,
        "evaluate_every": config.evaluation.every,
        "optimizer": {**TRAINER_DEFAULTS, "lr": rate},
        "lr_scheduler": "linear",
        "precision": config.runtime.precision,
        "device": config.runtime.device,
        "threads": config.runtime.threads,
        "tuned": False,
    }


def held_out_inputs(config: RunConfig, folder: Path, data: str) -> dict[str, Any]:
    """Write the held-out windows that resmol evaluates on; return their path and the bytes that they stand for.

    Raises:
        DataError: Nothing is held out.
    """
    stream, windows = open_dataset(Path(data)).val, config.evaluation.windows
    if len(stream) <= config.data.seq_len:
        raise DataError("there are no held-out tokens to compare on", fix="give --data with more text")
    loader = make_loader(config, stream)
    tokenizer = load_tokenizer(None, sha256=config.tokenizer.sha256)
    batches = list(loader.sequential(1, windows))
    rows = {
        "input_ids": torch.cat([batch.input_ids for batch in batches]),
        "targets": torch.cat([batch.targets for batch in batches]),
    }
    file = folder / "held-out.safetensors"
    save_file(rows, file)
    predicted = rows["targets"][rows["targets"] != IGNORE_INDEX].numpy()
    spelled = tokenizer.spelled_end_bytes(loader.spelled_ends(windows))
    return {"held_out": str(file), "held_out_bytes": int(tokenizer.byte_lengths()[predicted].sum()) + spelled}
