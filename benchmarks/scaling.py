"""How step time, speed and memory of training grow with length, batch and size: ``python benchmarks/scaling.py``.

Each point is a process of its own with a limit on its time and memory. A point that exceeds a limit is a result too,
and is shown as such. Points are appended to OUT/points.jsonl as soon as they are measured, and one that is there under
the same conditions is not measured again.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from resmol.audit.plots import STYLE, WIDE, svg
from resmol.bench.comparison import markdown_table
from resmol.bench.machine import machine_facts
from resmol.bench.subprocess_runs import QUIET, prepared_folder, run_training
from resmol.cli.terminal import show_messages
from resmol.config.load import load_preset, parse_overrides
from resmol.config.run_config import RunConfig
from resmol.errors import ConfigError, ResmolError, UsageError
from resmol.model.flops import training_flops_per_token
from resmol.system.host import free_memory
from resmol.train.autotune import needed_memory, resolve_auto

logger = logging.getLogger("resmol.benchmarks.scaling")

# Signs of a lack of memory in messages of PyTorch, C++ and the loader of libraries.
# The last is what Python says when it has no memory left to compile a module.
OUT_OF_MEMORY = ("memory", "bad_alloc", "cannot map", "failed to map", "returned null without setting")
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
        seconds: The time limit of a point.
        memory_bytes: The memory limit of a point; 0 takes what is free.
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


def measure_all(
    scaling: Scaling,
    folder: Path,
    data: str,
    out: Path,
    measure: Callable[[Scaling, RunConfig, Path, str], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Measure every new point, and write table and plot after each, so that Ctrl-C loses one point at most.

    Args:
        scaling: What to measure.
        folder: For the files of the processes.
        data: A prepared folder.
        out: Gets points.jsonl, scaling.md and scaling.svg.
        measure: By default `measure_point`.

    Returns:
        The points of this call, including those measured before.
    """
    measure = measure or measure_point
    out.mkdir(parents=True, exist_ok=True)
    configurations, points = scaling.configurations(), []
    for number, config in enumerate(configurations, 1):
        key = conditions(scaling, config)
        point = known_points(out).get(json.dumps(key, sort_keys=True))
        if point is None:
            point = {"key": key, **measure(scaling, config, folder, data)}
            with (out / POINTS).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(point) + "\n")
        points.append(point)
        logger.info(f"point {number} of {len(configurations)}: {', '.join(filter(None, row(point)))}")
        (out / TABLE).write_text(table(points), encoding="utf-8")
        (out / PLOT).write_text(scaling_plot(points), encoding="utf-8")
    return points


def conditions(scaling: Scaling, config: RunConfig) -> dict[str, Any]:
    """Return what the result of a point depends on; points with other values are other points."""
    sizes = {"preset": config.name, "rows": config.batch.micro_batch_size, "seq_len": config.data.seq_len}
    limits = {"steps": scaling.steps, "warmup": scaling.warmup, "seconds": scaling.seconds}
    return {**sizes, **limits, "config": config.sha256, **machine_facts(config.runtime.threads)}


def known_points(out: Path) -> dict[str, dict[str, Any]]:
    """Return the points that were measured before, by their conditions; a line that was cut off is ignored."""
    points = {}
    for line in (out / POINTS).read_text(encoding="utf-8").splitlines() if (out / POINTS).is_file() else []:
        try:
            point = json.loads(line)
        except ValueError:
            continue
        if isinstance(point, dict) and point.get("outcome") == "measured":  # what exceeded a limit is tried again
            points[json.dumps(point["key"], sort_keys=True)] = point
    return points


def measure_point(scaling: Scaling, config: RunConfig, folder: Path, data: str) -> dict[str, Any]:
    """Train a few steps in a process of its own; return its metrics, or the limit that it exceeded."""
    resolved, _ = resolve_auto(config)
    recompute = resolved.runtime.activation_checkpointing == "on"
    point: dict[str, Any] = {
        "estimated_bytes": needed_memory(resolved, recompute=recompute),
        "flops_per_token": training_flops_per_token(config.model, config.data.seq_len),
    }
    steps, most = scaling.warmup + scaling.steps, scaling.memory_bytes or free_memory()
    run = run_training(resolved, folder, data, steps, seconds=scaling.seconds, memory_bytes=most)
    if run.process.timed_out:
        return {**point, "outcome": f"took more than {scaling.seconds:.0f} s"}
    if run.process.code:
        error = run.process.error_tail
        out_of_memory = run.process.code == -9 or any(sign in error.lower() for sign in OUT_OF_MEMORY)
        return {**point, "outcome": "did not fit in memory" if out_of_memory else f"failed: {error}"}
    return {**point, "outcome": "measured", **run.metrics(scaling.warmup)}


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
    """Return the table of points as Markdown; GFLOP/s are counted operations divided by measured time."""
    return "\n".join([*markdown_table(TITLES, [row(point) for point in points]), ""])


def scaling_plot(points: Sequence[dict[str, Any]]) -> str:
    """Return an SVG of speed and memory against the length of a window: a line for each preset and batch.

    Args:
        points: As in points.jsonl; those that were not measured are left out.
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


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Return the numbers of a comma-separated list (`UsageError` if it is something else)."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"{option} is {text!r}", fix=f"write e.g. {option} 128,256") from None


def main(
    out: Annotated[Path, typer.Option(help="Folder for the points, the table and the plot.")],
    presets: Annotated[str, typer.Option(help="Names, separated by commas.")] = "nano,smollm2-135m,smollm2-360m",
    lengths: Annotated[str, typer.Option(help="Tokens of a window.")] = "128,256,512,1024,2048,4096,8192",
    batches: Annotated[str, typer.Option(help="Windows of a step.")] = "1",
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeatable.")] = None,
    steps: Annotated[int, typer.Option(help="Timed steps of a point.")] = 3,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 2,
    seconds: Annotated[float, typer.Option(help="The time limit of a point.")] = 600.0,
    memory: Annotated[float, typer.Option(help="The memory limit of a point in GiB; 0 takes what is free.")] = 0.0,
    data: Annotated[str | None, typer.Option(help="Prepared folder or text; Shakespeare by default.")] = None,
) -> None:
    """Measure training against length, batch and size; points that were measured before are not measured again."""
    show_messages()
    names = tuple(filter(None, presets.split(",")))
    sizes = (numbers("--lengths", lengths), numbers("--batches", batches))
    scaling = Scaling(names, *sizes, tuple(set_ or ()), steps, warmup, seconds, int(memory * 2**30))
    first = scaling.configurations()[0]
    with tempfile.TemporaryDirectory(prefix="resmol-scaling-") as name:
        folder = Path(name)
        typer.echo(table(measure_all(scaling, folder, prepared_folder(data, first, folder / "data"), out)))


if __name__ == "__main__":
    try:
        typer.run(main)
    except ResmolError as error:
        sys.exit(f"error: {error.what}\n  fix: {error.fix}")
