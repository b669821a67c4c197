"""The plot of `resmol bench learn`: held-out bits per byte against seconds of training and against tokens."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from resmol.audit.plots import BLUE, GREY, ORANGE, STYLE, svg
from resmol.bench.learn import OURS, USUAL_RATE, LearnResult, trainer_name

SIZE = (9.0, 3.6)


def learning_svg(result: LearnResult) -> str:
    """Return an SVG with a line for each run; runs of one learner have one color."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, 2, sharey=True)
        colors = {OURS: BLUE, trainer_name(USUAL_RATE): GREY, **({result.tuned: ORANGE} if result.tuned else {})}
        for axes, quantity in zip(panels, ("seconds", "tokens"), strict=True):
            for name, color in colors.items():
                _lines(axes, result, name, color, quantity)
            axes.set_xlabel("seconds of training" if quantity == "seconds" else "tokens")
            axes.set_xlim(left=0)
        panels[0].set_ylabel("held-out bits per byte")
        if panels[0].lines:  # there are none before the first run is done
            panels[0].legend(frameon=False)
        return svg(figure, transparent=False)


def _lines(axes: Any, result: LearnResult, name: str, color: str, quantity: str) -> None:
    label: str | None = name
    for seed in result.seeds:
        if curve := result.curve(name, seed):
            across = [getattr(point, quantity) for point in curve]
            axes.plot(across, [point.bits_per_byte for point in curve], color=color, label=label, linewidth=1.2)
            label = None
