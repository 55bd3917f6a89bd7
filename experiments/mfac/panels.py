"""Panels of lines with a band for the spread over seeds."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from experiments.figure import COLOURS, FAINT, INK, PALE


def draw_panel(axes: Axes, title: str, xlabel: str, x: Sequence[float], lines: dict[str, list[list[float]]]) -> None:
    """For each label the mean over seeds and a band of one standard deviation.

    Args:
        axes: what to draw on.
        title: of the panel.
        xlabel: what `x` is.
        x: `(n,)`.
        lines: by label, one list `(n,)` for each seed.
    """
    for rank, ((label, curves), colour) in enumerate(zip(lines.items(), COLOURS, strict=False)):
        values = np.array(curves)
        mean, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0
        axes.plot(x, mean, color=colour, linewidth=2.0, marker="o", markersize=3.5, zorder=10 - rank, label=label)
        axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(xlabel, color=INK)
    axes.tick_params(which="both", colors=PALE, length=0)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
