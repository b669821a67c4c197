"""Training curves: SVG for the report, PNG for a model card; drawn by matplotlib without pyplot's global state."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from resmol.run.ledger import Record, effective_steps, select

MAX_POINTS = 1200
BLUE, ORANGE, GREEN, GREY, RED = "#2b6cb0", "#c05621", "#2f855a", "#a0aec0", "#c53030"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#edf2f7",
    "axes.edgecolor": "#718096",
    "axes.axisbelow": True,
    "svg.hashsalt": "resmol",  # the same record gives the same page
    "svg.fonttype": "none",
}


Painter = Callable[[Any, list[Record], Sequence[Record]], None]
Drawing = TypeVar("Drawing", str, bytes)
WIDE, SMALL = (7.2, 3.0), (4.4, 2.6)
PNG_DOTS_PER_INCH = 150


def curves(records: Sequence[Record]) -> dict[str, str]:
    """Return title -> SVG for the loss, the learning rate, the gradient norm and the speed."""
    return {title: _draw(records, paint, size, svg) for title, (paint, size) in _panels(records).items()}


def curve_images(records: Sequence[Record]) -> dict[str, bytes]:
    """Return title -> PNG of the same curves, for pages that do not show embedded SVG."""
    return {title: _draw(records, paint, size, _png) for title, (paint, size) in _panels(records).items()}


def loss_image(records: Sequence[Record], suffix: str) -> bytes:
    """Return the loss curve as the content of an image file, on white.

    Args:
        records: The records of a ledger; they hold at least one step.
        suffix: ``.svg`` or ``.png``.
    """
    paint, size = _panels(records)["Loss"]
    if suffix == ".png":
        return _draw(records, paint, size, _png)
    return _draw(records, paint, size, lambda figure: svg(figure, transparent=False)).encode()


def _panels(records: Sequence[Record]) -> dict[str, tuple[Painter, tuple[float, float]]]:
    if not effective_steps(list(records)):
        return {}
    return {
        "Loss": (_loss, WIDE),
        "Learning rate": (lambda axes, steps, _: _line(axes, steps, "lr", "learning rate"), SMALL),
        "Gradient norm": (_gradient_norm, SMALL),
        "Speed": (_speed, SMALL),
    }


def _draw(
    records: Sequence[Record], paint: Painter, size: tuple[float, float], save: Callable[[Figure], Drawing]
) -> Drawing:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        paint(axes, list(effective_steps(list(records)).values()), records)
        _mark_resumes(axes, records, labelled=paint is _loss)
        axes.set_xlabel("step")
        axes.margins(x=0.01)
        return save(figure)


def svg(figure: Figure, *, transparent: bool = True) -> str:
    """Return a figure as an SVG element."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=transparent)
    text = out.getvalue()
    return text[text.index("<svg") :]  # without the XML declaration, which is not allowed inside HTML


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=PNG_DOTS_PER_INCH, metadata={"Software": None})
    return out.getvalue()


def _mark_resumes(axes: Any, records: Sequence[Record], *, labelled: bool) -> None:
    resumes = [record["next_step"] for record in select(list(records), "resume")]
    for number, step in enumerate(resumes):
        axes.axvline(step, color=RED, linewidth=1, linestyle=(0, (4, 3)))
        if labelled and number in (0, len(resumes) - 1):
            low, high = axes.get_xlim()
            side = "right" if step > (low + high) / 2 else "left"
            offset = -4 if side == "right" else 4
            axes.annotate(
                f"resumed at {step}", (step, 1.0), xycoords=("data", "axes fraction"), xytext=(offset, -2),
                textcoords="offset points", color=RED, fontsize=8, ha=side, va="top",
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
    means = smoothed([record["loss"] for record in steps], span=max(2, len(steps) // 50))
    at = dict(zip((record["step"] for record in steps), means, strict=True))
    axes.plot(numbers, [at[number] for number in numbers], color=BLUE, linewidth=1.8, label="train, smoothed")
    held_out = [r for r in select(list(records), "eval") if r["step"] <= steps[-1]["step"]]
    if held_out:
        points = ([r["step"] for r in held_out], [r["loss"] for r in held_out])
        axes.plot(*points, "o-", color=ORANGE, markersize=4, linewidth=1, label="held out")
    averaged = [r for r in held_out if "averaged_loss" in r]
    if averaged:
        points = ([r["step"] for r in averaged], [r["averaged_loss"] for r in averaged])
        axes.plot(*points, "o-", color=GREEN, markersize=4, linewidth=1, label="held out, averaged weights")
    axes.set_ylabel("nats per token")
    axes.legend(frameon=False, fontsize=8)


def _line(axes: Any, steps: list[Record], name: str, label: str) -> None:
    kept = thin(steps)
    axes.plot([r["step"] for r in kept], [r[name] for r in kept], color=BLUE, linewidth=1.5)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)


def _gradient_norm(axes: Any, steps: list[Record], _records: Sequence[Record]) -> None:
    kept = thin(steps)
    axes.plot([r["step"] for r in kept], [r["grad_norm"] for r in kept], color=BLUE, linewidth=0.7)
    axes.set_yscale("log")
    axes.set_ylabel("before clipping")


def _speed(axes: Any, steps: list[Record], _records: Sequence[Record]) -> None:
    """Plot medians over several steps: single steps on a shared machine are noisy."""
    span = max(1, len(steps) // 200)
    groups = [steps[start : start + span] for start in range(0, len(steps), span)]
    rates = [statistics.median(r["tokens"] / max(r["seconds"], 1e-9) for r in group) for group in groups]
    axes.plot([group[-1]["step"] for group in groups], rates, color=BLUE, linewidth=1.2)
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0, top=1.15 * max(rates))
