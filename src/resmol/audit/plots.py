"""Training curves: SVG for the report, PNG for a model card; drawn by matplotlib without pyplot's global state."""

from __future__ import annotations

import bisect
import io
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from resmol.run.ledger import Record, effective_steps, select

MAX_POINTS = 1200
# The colours of a figure on white paper. In a page they are CSS variables, so that it can have others in the dark.
BLUE, ORANGE, GREEN, GREY, RED = "#2b6cb0", "#c05621", "#2f855a", "#a0aec0", "#c53030"
INK, AXIS, GRID = "#4a5568", "#718096", "#e8edf3"
THEME = {
    BLUE: "blue", ORANGE: "orange", GREEN: "green", GREY: "grey", RED: "red", INK: "ink", AXIS: "axis", GRID: "grid",
}  # fmt: skip
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.color": AXIS,
    "ytick.color": AXIS,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.edgecolor": AXIS,
    "axes.axisbelow": True,
    "svg.hashsalt": "resmol",  # the same record gives the same page
    "svg.fonttype": "none",
}


Painter = Callable[[Any, list[Record], Sequence[Record]], None]
Drawing = TypeVar("Drawing", str, bytes)
Size = tuple[float, float]  # inches; text has 10 points, so a picture is drawn at about the width that it is shown at
WIDE, HALF, THIRD = (7.2, 3.0), (4.6, 2.9), (3.4, 2.4)
PNG_DOTS_PER_INCH = 150
# The second loss curve begins where the smoothed loss has done three quarters of its fall, which hides the rest; at the
# earliest after a tenth of the steps, at the latest after half of them. Of a short run it would show noise.
LATE_FALL, LATE_BOUNDS, ENOUGH_FOR_LATE = 0.75, (0.1, 0.5), 50


@dataclass(frozen=True)
class Panel:
    """A picture of the record.

    Attributes:
        paint: Draws it.
        size: Its size in a page, in inches.
        first: The first step that it shows.
        image: Its size as an image of its own; None where it is in the page alone.
    """

    paint: Painter
    size: Size
    first: int = 1
    image: Size | None = THIRD


def curves(records: Sequence[Record]) -> dict[str, str]:
    """Return title -> SVG for a page, whose style sheet gives the variables ``--plot-blue`` and so on of `THEME`."""
    return {title: _draw(records, panel, panel.size, _themed) for title, panel in _panels(records).items()}


def curve_images(records: Sequence[Record]) -> dict[str, bytes]:
    """Return title -> PNG of the same curves, for pages that do not show embedded SVG."""
    panels = _panels(records)
    return {title: _draw(records, panel, panel.image, _png) for title, panel in panels.items() if panel.image}


def loss_image(records: Sequence[Record], suffix: str) -> bytes:
    """Return the loss curve as the content of an image file, on white.

    Args:
        records: The records of a ledger; they hold at least one step.
        suffix: ``.svg`` or ``.png``.
    """
    panel = _panels(records)["Loss"]
    if suffix == ".png":
        return _draw(records, panel, WIDE, _png)
    return _draw(records, panel, WIDE, lambda figure: svg(figure, transparent=False)).encode()


def _panels(records: Sequence[Record]) -> dict[str, Panel]:
    steps = effective_steps(list(records))
    if not steps:
        return {}
    late = _late(list(steps.values()))
    after = {f"Loss from step {late:,} on": Panel(_loss, HALF, late, None)} if len(steps) >= ENOUGH_FOR_LATE else {}
    return {
        "Loss": Panel(_loss, HALF if after else WIDE, image=WIDE),
        **after,
        "Learning rate": Panel(lambda axes, steps, _: _line(axes, steps, "lr", "learning rate"), THIRD),
        "Gradient norm": Panel(_gradient_norm, THIRD),
        "Speed": Panel(_speed, THIRD),
    }


def _late(steps: Sequence[Record]) -> int:
    """Return the first step of the second loss curve."""
    means = _means(steps)
    height = max(means) - LATE_FALL * (max(means) - min(means))
    fallen = next(number for number, mean in enumerate(means) if mean <= height)
    low, high = (int(share * len(steps)) for share in LATE_BOUNDS)
    return int(steps[min(max(fallen, low), high)]["step"])


def _means(steps: Sequence[Record]) -> list[float]:
    return smoothed([record["loss"] for record in steps], span=max(2, len(steps) // 50))


def _draw(records: Sequence[Record], panel: Panel, size: Size, save: Callable[[Figure], Drawing]) -> Drawing:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        shown = [record for step, record in effective_steps(list(records)).items() if step >= panel.first]
        panel.paint(axes, shown, records)
        axes.margins(x=0.01)
        _mark_resumes(
            axes, [step for step in resumed_at(records) if step >= panel.first], labelled=panel.paint is _loss
        )
        axes.set_xlabel("step")
        return save(figure)


def svg(figure: Figure, *, transparent: bool = True) -> str:
    """Return a figure as an SVG element."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=transparent)
    text = out.getvalue()
    return text[text.index("<svg") :]  # without the XML declaration, which is not allowed inside HTML


def _themed(figure: Figure) -> str:
    """Return a figure as an SVG element whose colours are variables of the page, each with the one on white."""
    return re.sub("|".join(THEME), lambda colour: f"var(--plot-{THEME[colour[0]]}, {colour[0]})", svg(figure))


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=PNG_DOTS_PER_INCH, metadata={"Software": None})
    return out.getvalue()


def resumed_at(records: Sequence[Record]) -> list[int]:
    """Return each step of the run's history that another process executed than the step before.

    A resume that no step followed, or whose steps were taken back, is none.
    """
    resumes = [record["seq"] for record in select(list(records), "resume")]
    steps = effective_steps(list(records))
    processes = {step: bisect.bisect_left(resumes, record["seq"]) for step, record in steps.items()}
    return [step for step, process in processes.items() if process != processes.get(step - 1, process)]


def _mark_resumes(axes: Any, resumes: Sequence[int], *, labelled: bool) -> None:
    """Mark each resume; the first and the last are named above the axes, where nothing is drawn."""
    low, high = axes.get_xlim()
    for step in resumes:
        axes.axvline(step, color=RED, linewidth=1, linestyle=(0, (4, 3)))
    for line, step in enumerate(sorted({*resumes[:1], *resumes[-1:]}) if labelled else ()):
        axes.annotate(
            f"resumed at {step:,}", (step, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 2 + 10 * line),
            textcoords="offset points", color=RED, fontsize=9, va="bottom",
            ha="right" if step > (low + high) / 2 else "left",
        )  # fmt: skip


def thin(steps: Sequence[Record], limit: int = MAX_POINTS) -> list[Record]:
    """Return every n-th record, always including the first and the last."""
    stride = max(1, len(steps) // limit)
    kept = list(steps[::stride])
    return kept if kept[-1] is steps[-1] else [*kept, steps[-1]]


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """Return the exponential moving average with bias correction (Kingma & Ba 2015, section 3)."""
    decay, total, weight, out = 1 - 2 / (span + 1), 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(total / weight)
    return out


def _loss(axes: Any, steps: list[Record], records: Sequence[Record]) -> None:
    kept = thin(steps)
    numbers = [record["step"] for record in kept]
    axes.plot(numbers, [record["loss"] for record in kept], color=GREY, linewidth=0.5, label="train, each step")
    means = _means(steps)
    at = dict(zip((record["step"] for record in steps), means, strict=True))
    axes.plot(numbers, [at[number] for number in numbers], color=BLUE, linewidth=1.8, label="train, smoothed")
    held_out = [r for r in select(list(records), "eval") if steps[0]["step"] <= r["step"] <= steps[-1]["step"]]
    if held_out:
        points = ([r["step"] for r in held_out], [r["loss"] for r in held_out])
        axes.plot(*points, "o-", color=ORANGE, markersize=4, linewidth=1, label="held out")
    averaged = [r for r in held_out if "averaged_loss" in r]
    if averaged:
        points = ([r["step"] for r in averaged], [r["averaged_loss"] for r in averaged])
        axes.plot(*points, "o-", color=GREEN, markersize=4, linewidth=1, label="held out, averaged weights")
    if steps[0]["step"] > 1:  # single steps are noisier than what the rest of a run learns: they may leave the picture
        shown = [*means, *(record["loss"] for record in held_out)]
        room = 0.4 * max(max(shown) - min(shown), 1e-3)
        axes.set_ylim(min(shown) - room, max(shown) + room)
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False, fontsize=9, loc="upper right")


def _line(axes: Any, steps: list[Record], name: str, label: str) -> None:
    kept = thin(steps)
    axes.plot([r["step"] for r in kept], [r[name] for r in kept], color=BLUE, linewidth=1.5)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)


def _gradient_norm(axes: Any, steps: list[Record], _records: Sequence[Record]) -> None:
    kept = thin([r for r in steps if r["grad_norm"] is not None])  # a step that was skipped has none
    axes.plot([r["step"] for r in kept], [r["grad_norm"] for r in kept], color=BLUE, linewidth=0.7)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("before clipping")


def _speed(axes: Any, steps: list[Record], _records: Sequence[Record]) -> None:
    """Plot medians over several steps: single steps on a shared machine are noisy."""
    span = max(1, len(steps) // 200)
    groups = [steps[start : start + span] for start in range(0, len(steps), span)]
    rates = [statistics.median(r["tokens"] / max(r["seconds"], 1e-9) for r in group) for group in groups]
    axes.plot([group[-1]["step"] for group in groups], rates, color=BLUE, linewidth=1.2)
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0, top=1.15 * max(rates))
