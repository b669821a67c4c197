"""`resmol bench scaling`: step time, speed and memory of training against length, batch and size of the model.

Each point is a process of its own with a time and a memory of its own to spend. A point that needs more is a result as
well, and is shown as such. Points are kept as lines of OUT/points.jsonl as they come, and one that is there under the
same circumstances is not measured again.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from resmol.audit.plots import STYLE, WIDE, svg
from resmol.bench.comparison import markdown_table
from resmol.bench.machine import machine_facts
from resmol.bench.subprocess_runs import QUIET, run_training, training_measurement
from resmol.config.load import load_preset, parse_overrides
from resmol.config.run_config import RunConfig
from resmol.errors import ConfigError, UsageError
from resmol.model.flops import training_flops_per_token
from resmol.system.host import free_memory
from resmol.train.autotune import needed_memory, resolve_auto

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = ("memory", "bad_alloc", "cannot map")  # as PyTorch, C++ and the loader of libraries say it
POINTS, TABLE, PLOT = "points.jsonl", "scaling.md", "scaling.svg"
TITLES = ("preset", "batch", "step, s", "tokens/s", "peak memory, MiB", "estimated, MiB", "GFLOP/token", "GFLOP/s", "")


@dataclass(frozen=True)
class Scaling:
    """What to measure: every combination, the cheap ones first.

    Attributes:
        presets: Names of presets.
        lengths: Tokens of a window.
        batches: Windows of a step.
        overrides: ``key=value``, laid over each.
        steps: Timed steps of a point.
        warmup: Steps before them.
        seconds: The time of a point.
        memory_bytes: The memory of a point.
    """

    presets: tuple[str, ...]
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    overrides: tuple[str, ...] = ()
    steps: int = 3
    warmup: int = 2
    seconds: float = 600.0
    memory_bytes: int = 0

    def __post_init__(self) -> None:
        numbers = {"--lengths": self.lengths, "--batches": self.batches, "--steps": (self.steps,)}
        for name, values in numbers.items():
            if not values or min(values) < 1:
                raise UsageError(
                    f"{name} is {', '.join(map(str, values)) or 'empty'}", fix="give numbers of at least 1"
                )
        if self.warmup < 0:
            raise UsageError(f"--warmup is {self.warmup}", fix="give a number of steps, 0 or more")
        if not 0 < self.seconds < math.inf:  # also NaN
            raise UsageError(f"--seconds is {self.seconds}", fix="give a time of more than 0 seconds")
        if self.memory_bytes < 0:
            raise UsageError(
                f"--memory is {self.memory_bytes} bytes", fix="give a size of more than 0, or leave it out"
            )

    def configurations(self) -> list[RunConfig]:
        """Return a configuration for each point; lengths beyond a model's context are left out.

        Raises:
            ConfigError: A preset or an override is wrong, or no length fits.
        """
        points = [
            preset.replace(
                {
                    "data.seq_len": length,
                    "batch.micro_batch_size": rows,
                    "batch.global_batch_tokens": rows * length,
                    "runtime.precision": "float32",
                    "runtime.compile": "off",
                    **parse_overrides(self.overrides),
                    **QUIET,
                }
            )
            for preset in map(load_preset, self.presets)
            for length in self.lengths
            for rows in self.batches
            if length <= preset.model.max_position_embeddings
        ]
        if not points:
            raise ConfigError("no length fits the context of any preset", fix="give smaller --lengths")
        return sorted(points, key=step_flops)


def step_flops(config: RunConfig) -> int:
    """Return the counted operations of a step."""
    return config.batch.global_batch_tokens * training_flops_per_token(config.model, config.data.seq_len)


def scale(
    wanted: Scaling, folder: Path, data: str, out: Path, measure: Callable[..., dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Measure every point that is not known yet, and write table and plot after each, so that Ctrl-C loses one point.

    Args:
        wanted: What to measure.
        folder: For the files of the processes.
        data: A prepared folder.
        out: Gets points.jsonl, scaling.md and scaling.svg.
        measure: Takes (wanted, configuration, folder, data); by default `measure_point`.

    Returns:
        The points of this call, known ones included.
    """
    measure = measure or measure_point
    out.mkdir(parents=True, exist_ok=True)
    configurations, found = wanted.configurations(), []
    for number, config in enumerate(configurations, 1):
        key = circumstances(wanted, config)
        point = known_points(out).get(json.dumps(key, sort_keys=True))
        if point is None:
            point = {"key": key, **measure(wanted, config, folder, data)}
            with (out / POINTS).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(point) + "\n")
        found.append(point)
        logger.info(f"point {number} of {len(configurations)}: {', '.join(filter(None, row(point)))}")
        (out / TABLE).write_text(table(found), encoding="utf-8")
        (out / PLOT).write_text(scaling_plot(found), encoding="utf-8")
    return found


def circumstances(wanted: Scaling, config: RunConfig) -> dict[str, Any]:
    """Return what a point depends on; another value is another point."""
    sizes = {"preset": config.name, "rows": config.batch.micro_batch_size, "seq_len": config.data.seq_len}
    spent = {"steps": wanted.steps, "warmup": wanted.warmup, "seconds": wanted.seconds}
    return {**sizes, **spent, "config": config.sha256, **machine_facts(config.runtime.threads)}


def known_points(out: Path) -> dict[str, dict[str, Any]]:
    """Return the points of an earlier call by their circumstances; a line that was cut off is none."""
    points = {}
    for line in (out / POINTS).read_text(encoding="utf-8").splitlines() if (out / POINTS).is_file() else []:
        try:
            point = json.loads(line)
        except ValueError:
            continue
        if isinstance(point, dict) and point.get("outcome") == "measured":  # what did not fit is tried again
            points[json.dumps(point["key"], sort_keys=True)] = point
    return points


def measure_point(wanted: Scaling, config: RunConfig, folder: Path, data: str) -> dict[str, Any]:
    """Train a few steps in a process of its own; what it could not do is its outcome."""
    settled, _ = resolve_auto(config)
    recompute = settled.runtime.activation_checkpointing == "on"
    point: dict[str, Any] = {
        "estimated_bytes": needed_memory(settled, recompute=recompute),
        "flops_per_token": training_flops_per_token(config.model, config.data.seq_len),
    }
    steps, limit = wanted.warmup + wanted.steps, wanted.memory_bytes or free_memory()
    done, records = run_training(settled, folder, data, steps, seconds=wanted.seconds, memory_bytes=limit)
    if done.timed_out:
        return {**point, "outcome": f"took more than {wanted.seconds:.0f} s"}
    if done.code:
        out_of_memory = done.code == -9 or any(sign in done.error_tail.lower() for sign in OUT_OF_MEMORY)
        return {**point, "outcome": "did not fit in memory" if out_of_memory else f"failed: {done.error_tail}"}
    return {**point, "outcome": "measured", **asdict(training_measurement(done, records, wanted.warmup))}


def row(point: dict[str, Any]) -> list[str]:
    """Return the cells of a point."""
    key, measured = point["key"], point["outcome"] == "measured"
    rate = point.get("tokens_per_second", 0.0)
    return [
        key["preset"],
        f"{key['rows']} x {key['seq_len']}",
        f"{statistics.median(point['step_seconds']):.3f}" if measured else "",
        f"{rate:,.0f}" if measured else "",
        f"{point['peak_bytes'] / 2**20:,.0f}" if measured else "",
        f"{point['estimated_bytes'] / 2**20:,.0f}",
        f"{point['flops_per_token'] / 1e9:.3f}",
        f"{rate * point['flops_per_token'] / 1e9:,.0f}" if measured else "",
        "" if measured else point["outcome"],
    ]


def table(points: list[dict[str, Any]]) -> str:
    """Return the table of points, as Markdown; GFLOP/s are counted operations by measured time."""
    return "\n".join([*markdown_table(TITLES, [row(point) for point in points]), ""])


def scaling_plot(points: Sequence[dict[str, Any]]) -> str:
    """Return an SVG of speed and memory against the length of a window: a line for each preset and batch.

    Args:
        points: As `resmol bench scaling` keeps them; those that were not measured are left out.
    """
    lines: dict[str, list[dict[str, Any]]] = {}
    for point in (point for point in points if point["outcome"] == "measured"):
        lines.setdefault(f"{point['key']['preset']}, {point['key']['rows']} a step", []).append(point)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=WIDE, layout="constrained")
        FigureCanvasSVG(figure)
        speed, memory = figure.subplots(1, 2)
        for label, line in lines.items():
            line.sort(key=lambda point: point["key"]["seq_len"])
            lengths = [point["key"]["seq_len"] for point in line]
            speed.plot(lengths, [point["tokens_per_second"] for point in line], "o-", markersize=4, label=label)
            memory.plot(lengths, [point["peak_bytes"] / 2**30 for point in line], "o-", markersize=4)
        for axes, label in ((speed, "tokens per second"), (memory, "peak memory, GiB")):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("tokens of a window")
            axes.set_ylabel(label)
        speed.set_yscale("log")  # models of other sizes lie far apart
        memory.set_ylim(bottom=0)
        if lines:
            memory.legend(*speed.get_legend_handles_labels(), frameon=False, fontsize=8)
        return svg(figure)
