"""Draws a recipe's timeline: learning rate, sparsity, zeros and phases over the epochs. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparse_accel.recipe.timeline_plan import Held, Timeline, number
from sparse_accel.recipe.timeline_shapes import Course, Lane, courses, curves, lanes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES: Final = (".png", ".svg")
# Bars with less of the width than this have their words on two lines, or none.
_NARROW, _TOO_NARROW = 0.13, 0.05
_LINES: Final = ("#2171b5", "#d94801", "#238b45", "#6a51a3")
_LOOKS: Final = {"zeros": "#969696", "moving": "#fdae6b", "fixed": "#d94801", "teacher": "#74c476"}


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(plan: Timeline, path: Path, title: str, held: Held | None = None) -> None:
    """Write the timeline into a PNG or SVG, as the file's name says. `held` is as for `timeline_plan.table`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn, pruning = lanes(plan, held), courses(plan)
    heights = [2.6, *([1.6] if pruning else []), *([0.45 * len(drawn) + 0.25] if drawn else [])]
    figure = Figure(figsize=(9, 1.2 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_rates(panels[0], plan)
    if pruning:
        _draw_sparsity(panels[1], pruning)
    if drawn:
        _draw_lanes(panels[-1], drawn, plan.num_epochs)
    panels[-1].set_xlim(0, plan.num_epochs)
    panels[-1].set_xlabel("epoch")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def _draw_rates(axes: Axes, plan: Timeline) -> None:
    labelled: set[int] = set()
    for curve in curves(plan):
        group = plan.groups[curve.group]
        label = None if group is None or curve.group in labelled else f"group {group}"
        labelled.add(curve.group)
        colour = _LINES[curve.group % len(_LINES)]
        style = "-" if curve.group == 0 else "--"  # where groups agree, all of them are seen
        axes.plot(*zip(*curve.points, strict=True), color=colour, lw=1.6, ls=style, label=label)
    if any(rate is None for stretch in plan.stretches for rate in stretch.rates):
        axes.text(0.01, 0.05, "where there is no line, the flags say it", transform=axes.transAxes, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_ylabel("learning rate")
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(plan.groups) > 1:
        axes.legend(frameon=False, fontsize=8)


def _draw_sparsity(axes: Axes, pruning: list[Course]) -> None:
    """What masks of gradual pruning drop, as steps: from one update to the next it stands still."""
    for index, course in enumerate(pruning):
        colour = _LINES[index % len(_LINES)]
        epochs, shares = zip(*course.points, strict=True)
        axes.plot(epochs, shares, drawstyle="steps-post", color=colour, lw=1.6, label=course.name)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("sparsity")
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(pruning) > 1:
        axes.legend(frameon=False, fontsize=8)


def _draw_lanes(axes: Any, drawn: list[Lane], num_epochs: float) -> None:
    for row, lane in enumerate(drawn):
        for bar in lane.bars:
            axes.barh(row, bar.end - bar.start, 0.7, left=bar.start, color=_LOOKS[bar.look], edgecolor="white")
            share = (bar.end - bar.start) / num_epochs
            if share > _TOO_NARROW:
                fitting = bar.words if share > _NARROW else bar.words.replace(" ", "\n", 1)
                axes.text((bar.start + bar.end) / 2, row, fitting, ha="center", va="center", fontsize=8)
    axes.set_yticks(range(len(drawn)), [lane.name for lane in drawn])
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
