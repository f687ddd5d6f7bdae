"""A recipe's timeline as lines and bars, for whoever draws it: matplotlib, or a page in a browser."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Final

from sparse_accel.compress.plan import Phase
from sparse_accel.recipe.timeline_plan import PHASES, Held, Stretch, Timeline, gradual_pruning
from sparse_accel.timeline import Clock

# A curve has this many points, and every corner besides.
_NUM_POINTS: Final = 1000


@dataclass(frozen=True)
class Curve:
    """The learning rate of one param_group while one modifier sets it: points of epoch and rate. `group` counts the
    timeline's groups."""

    group: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Course:
    """The sparsity of masks that follow a function, as steps: points of epoch and share, each holding until the next."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Bar:
    """Something that holds from one epoch to another. `look` says what: zeros, moving, fixed (ranges) or teacher."""

    start: float
    end: float
    look: str
    words: str


@dataclass(frozen=True)
class Lane:
    """Bars of one thing, which do not overlap."""

    name: str
    bars: tuple[Bar, ...]


def curves(plan: Timeline, num_points: int = _NUM_POINTS) -> list[Curve]:
    """The learning rates that the recipe sets; none where the flags say them."""
    found = []
    for index in range(len(plan.groups)):
        for modifier, stretches in groupby(plan.stretches, key=lambda stretch: stretch.rates[index]):
            if modifier is None:
                continue
            part = list(stretches)
            points = []
            # A part is drawn to where it arrives, though the step at its end has the next part's rate.
            for clock in _clocks(part[0].first, part[-1].end, num_points):
                rate = modifier.learning_rate_at(clock)
                assert rate is not None  # it has begun
                points.append((clock.epoch, rate))
            found.append(Curve(index, tuple(points)))
    return found


def courses(plan: Timeline, num_points: int = _NUM_POINTS) -> list[Course]:
    """What gradual pruning drops, for each final sparsity of each modifier."""
    clocks = _clocks(Clock(0, plan.steps_per_epoch), Clock(plan.total_steps, plan.steps_per_epoch), num_points)
    found = []
    for modifier in gradual_pruning(plan.recipe):
        for final in modifier.final_sparsities:
            drawn = [
                (clock.epoch, modifier.course(clock, plan.num_epochs, final))
                for clock in clocks
                if modifier.interval.contains(clock)
            ]
            # On the way from a weight's own sparsity there is nothing to draw.
            known = tuple((epoch, share) for epoch, share in drawn if share is not None)
            if known:
                found.append(Course(f"to {final:.1%}", known))
    return found


def lanes(plan: Timeline, held: Held | None = None) -> list[Lane]:
    """What else the recipe does, in the lanes in which anything happens. `held` is as for `timeline_plan.table`."""

    def zeros(stretch: Stretch) -> tuple[str, str] | None:
        if not stretch.masking:
            return None
        shares = [f"{held[modifier]:.1%}" for modifier in stretch.masking] if held is not None else []
        return "zeros", " ".join(["held", *shares])

    def quantization(stretch: Stretch) -> tuple[str, str] | None:
        looks = {Phase.OBSERVE: "moving", Phase.FROZEN: "fixed"}
        return (looks[stretch.phase], PHASES[stretch.phase]) if stretch.phase in looks else None

    def distillation(stretch: Stretch) -> tuple[str, str] | None:
        teacher = stretch.distillation
        return None if teacher is None else ("teacher", f"hardness {teacher.hardness:g}, T {teacher.temperature:g}")

    found = []
    for name, looks in (("zeros", zeros), ("quantization", quantization), ("distillation", distillation)):
        bars = []
        for look, stretches in groupby(plan.stretches, key=looks):
            if look is not None:
                part = list(stretches)
                bars.append(Bar(part[0].first.epoch, min(part[-1].end.epoch, plan.num_epochs), *look))
        if bars:
            found.append(Lane(name, tuple(bars)))
    return found


def _clocks(first: Clock, end: Clock, num_points: int) -> list[Clock]:
    count = min(num_points, end.step - first.step)
    steps = {first.step + (end.step - first.step) * point // count for point in range(count + 1)}
    return [Clock(step, first.steps_per_epoch) for step in sorted(steps)]
