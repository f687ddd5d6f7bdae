"""Draws a recipe's timeline: learning rate, sparsity, zeros and phases over the epochs. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sparse_accel.compress.plan import Phase
from sparse_accel.recipe.timeline_plan import Held, Stretch, Timeline, gradual_pruning, number
from sparse_accel.timeline import Clock

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES: Final = (".png", ".svg")
# A curve has this many points, and every corner besides.
_NUM_POINTS: Final = 1000
# Bars with less of the width than this have their words on two lines, or none.
_NARROW, _TOO_NARROW = 0.13, 0.05
_LINES: Final = ("#2171b5", "#d94801", "#238b45", "#6a51a3")
_ZEROS, _MOVING, _FIXED, _TEACHER = "#969696", "#fdae6b", "#d94801", "#74c476"


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(plan: Timeline, path: Path, title: str, held: Held | None = None) -> None:
    """Write the timeline into a PNG or SVG, as the file's name says. `held` is as for `timeline_plan.table`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lanes, is_pruned = _lanes(plan, held), bool(gradual_pruning(plan.recipe))
    heights = [2.6, *([1.6] if is_pruned else []), *([0.45 * len(lanes) + 0.25] if lanes else [])]
    figure = Figure(figsize=(9, 1.2 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_rates(panels[0], plan)
    if is_pruned:
        _draw_sparsity(panels[1], plan)
    if lanes:
        _draw_lanes(panels[-1], lanes, plan.num_epochs)
    panels[-1].set_xlim(0, plan.num_epochs)
    panels[-1].set_xlabel("epoch")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def _draw_rates(axes: Axes, plan: Timeline) -> None:
    for index, group in enumerate(plan.groups):
        colour, label = _LINES[index % len(_LINES)], None if group is None else f"group {group}"
        style = "-" if index == 0 else "--"  # where groups agree, all of them are seen
        for modifier, stretches in groupby(plan.stretches, key=lambda stretch: stretch.rates[index]):
            if modifier is None:
                continue
            part = list(stretches)
            epochs = _epochs(part[0].first, part[-1].end)
            # A part is drawn to where it arrives, though the step at its end has the next part's rate.
            rates = [modifier.learning_rate_at(clock) for clock in epochs]
            axes.plot([clock.epoch for clock in epochs], rates, color=colour, lw=1.6, ls=style, label=label)
            label = None
    if any(rate is None for stretch in plan.stretches for rate in stretch.rates):
        axes.text(0.01, 0.05, "where there is no line, the flags say it", transform=axes.transAxes, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_ylabel("learning rate")
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(plan.groups) > 1:
        axes.legend(frameon=False, fontsize=8)


def _draw_sparsity(axes: Axes, plan: Timeline) -> None:
    """What masks of gradual pruning drop, as steps: from one update to the next it stands still."""
    clocks = _epochs(Clock(0, plan.steps_per_epoch), Clock(plan.total_steps, plan.steps_per_epoch))
    courses = [(modifier, final) for modifier in gradual_pruning(plan.recipe) for final in modifier.final_sparsities]
    for index, (modifier, final) in enumerate(courses):
        drawn = [
            (clock.epoch, modifier.course(clock, plan.num_epochs, final))
            for clock in clocks
            if modifier.interval.contains(clock)
        ]
        # On the way from a weight's own sparsity there is nothing to draw.
        known = [(epoch, share) for epoch, share in drawn if share is not None]
        axes.plot(
            [epoch for epoch, _ in known],
            [share for _, share in known],
            drawstyle="steps-post",
            color=_LINES[index % len(_LINES)],
            lw=1.6,
            label=f"to {final:.1%}",
        )
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("sparsity")
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(courses) > 1:
        axes.legend(frameon=False, fontsize=8)


def _epochs(first: Clock, end: Clock) -> list[Clock]:
    count = min(_NUM_POINTS, end.step - first.step)
    steps = {first.step + (end.step - first.step) * point // count for point in range(count + 1)}
    return [Clock(step, first.steps_per_epoch) for step in sorted(steps)]


# A lane: its name, and (from epoch, to epoch, colour, words) for each of its bars.
_Lane = tuple[str, list[tuple[float, float, str, str]]]


def _lanes(plan: Timeline, held: Held | None) -> list[_Lane]:
    def zeros(stretch: Stretch) -> tuple[str, str] | None:
        if not stretch.masking:
            return None
        shares = [f"{held[modifier]:.1%}" for modifier in stretch.masking] if held is not None else []
        return _ZEROS, " ".join(["held", *shares])

    def quantization(stretch: Stretch) -> tuple[str, str] | None:
        drawn = {Phase.OBSERVE: (_MOVING, "ranges move"), Phase.FROZEN: (_FIXED, "ranges fixed")}
        return drawn.get(stretch.phase)

    def distillation(stretch: Stretch) -> tuple[str, str] | None:
        teacher = stretch.distillation
        return None if teacher is None else (_TEACHER, f"hardness {teacher.hardness:g}, T {teacher.temperature:g}")

    lanes = []
    for name, looks in (("zeros", zeros), ("quantization", quantization), ("distillation", distillation)):
        bars = []
        for look, stretches in groupby(plan.stretches, key=looks):
            if look is not None:
                part = list(stretches)
                bars.append((part[0].first.epoch, min(part[-1].end.epoch, plan.num_epochs), *look))
        if bars:
            lanes.append((name, bars))
    return lanes


def _draw_lanes(axes: Any, lanes: list[_Lane], num_epochs: float) -> None:
    for row, (_, bars) in enumerate(lanes):
        for start, end, colour, words in bars:
            axes.barh(row, end - start, 0.7, left=start, color=colour, edgecolor="white")
            share = (end - start) / num_epochs
            if share > _TOO_NARROW:
                fitting = words if share > _NARROW else words.replace(" ", "\n", 1)
                axes.text((start + end) / 2, row, fitting, ha="center", va="center", fontsize=8)
    axes.set_yticks(range(len(lanes)), [name for name, _ in lanes])
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
