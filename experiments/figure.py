"""The figure of a comparison: validation and test loss of the model chosen so far, against inner solves."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from experiments.metrics import Record, by_method, incumbents

# From Okabe and Ito's palette: distinct under the common colour blindnesses.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#000000")
INK, PALE, FAINT = "#222222", "#666666", "#E3E3E3"
LABEL_GAP = 0.125  # between the middles of two labels, in heights of a panel


def draw_figure(runs: list[list[Record]], heading: str, path: Path) -> None:
    """Two panels as a PNG: validation loss, by which each method chooses, and test loss of the same model.

    Args:
        runs: records of one run per seed; with several seeds lines are means and bands hold the middle half.
        heading: what the data are.
        path: of the PNG.
    """
    figure = Figure(figsize=(12.5, 4.8), dpi=160, facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    left_ends = _draw_panel(left, runs, "Validation loss, best so far", lambda record: record.validation_loss)
    right_ends = _draw_panel(right, runs, "Test loss of that same model", lambda record: record.test_loss)
    _label_ends(left, left_ends)  # only now: both panels together decide the limits of the shared axis
    _label_ends(right, right_ends)
    left.set_ylabel("mean cross entropy (nats, log scale)", color=INK)
    seeds = "one seed" if len(runs) == 1 else f"mean of {len(runs)} seeds, bands hold the middle half"
    figure.text(0.06, 0.945, "Tuning the L2 penalties of logistic regression", size=14, weight="bold", color=INK)
    figure.text(0.06, 0.89, f"{heading}; {seeds}", size=9.5, color=PALE)
    figure.subplots_adjust(left=0.06, right=0.86, bottom=0.12, top=0.79, wspace=0.44)
    figure.savefig(path)


class _End(NamedTuple):
    """Where a line ends, and what to write there."""

    value: float
    label: str
    colour: str


def _draw_panel(axes: Axes, runs: list[list[Record]], title: str, value: Callable[[Record], float]) -> list[_End]:
    methods = [by_method(run) for run in runs]
    ends = []
    for rank, (name, colour) in enumerate(zip(methods[0], COLOURS, strict=False)):
        curves = np.array([[value(record) for record in incumbents(groups[name])] for groups in methods])
        solves, mean = np.arange(1, curves.shape[1] + 1), curves.mean(0)
        axes.plot(solves, mean, color=colour, linewidth=2.2, zorder=10 - rank)
        axes.fill_between(solves, *np.quantile(curves, (0.25, 0.75), axis=0), color=colour, alpha=0.1, linewidth=0)
        ends.append(_End(mean[-1], _label(methods[0][name][-1], mean[-1]), colour))
    _style(axes, title, len(solves))
    return ends


def _label(record: Record, loss: float) -> str:
    noun = "penalty" if record.num_penalties == 1 else "penalties"
    return f"{record.label}\n{loss:.3f}, {record.num_penalties} {noun}"


def _style(axes: Axes, title: str, num_solves: int) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("inner solves", color=INK)
    axes.set_xlim(1, num_solves)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="both", colors=PALE, length=0)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)


def _label_ends(axes: Axes, ends: list[_End]) -> None:
    """Writes each label beside the end of its line, moved up or down where two would overlap."""
    low, high = np.log(axes.get_ylim())
    ends = sorted(ends)
    heights = (np.log([end.value for end in ends]) - low) / (high - low)
    for height, place, end in zip(heights, _spread(heights), ends, strict=True):
        line = {
            "arrowstyle": "-",
            "color": end.colour,
            "linewidth": 0.8,
            "shrinkA": 0,
            "shrinkB": 0,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            end.label,
            xy=(1, height),
            xytext=(1.06, place),
            xycoords="axes fraction",
            color=end.colour,
            fontsize=9,
            va="center",
            arrowprops=line,
        )


def _spread(heights: np.ndarray) -> np.ndarray:
    """Places near the ascending `heights` and `LABEL_GAP` apart: neighbours that overlap push each other away."""
    places = heights.copy()
    for _ in range(100):
        overlaps = (LABEL_GAP - np.diff(places)).clip(min=0)
        places[:-1] -= overlaps / 2
        places[1:] += overlaps / 2
    return places
