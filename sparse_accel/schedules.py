"""Values that change over time, as pure functions of progress or of steps."""

from __future__ import annotations

import math

# A step count computed from epochs in floating point that lies this close to a whole number is that number.
_SAME_STEP = 1e-6


def linear(progress: float, initial: float, final: float) -> float:
    """initial + p (final - initial), for p in [0, 1].

    >>> linear(0.25, 0.0, 8.0)
    2.0
    """
    return initial + progress * (final - initial)


def cosine(progress: float, initial: float, final: float) -> float:
    """final + (initial - final) (1 + cos(pi p)) / 2: half a cosine that falls or rises, for p in [0, 1].

    >>> cosine(0.5, 4.0, 2.0)
    3.0
    """
    return final + (initial - final) * (1.0 + math.cos(math.pi * progress)) / 2.0


def cubic(progress: float, initial: float, final: float) -> float:
    """initial + (1 - (1 - p)^3) (final - initial): fast at first, slow at the end, for p in [0, 1].

    >>> cubic(0.5, 0.0, 8.0)
    7.0
    """
    return (1.0 - (1.0 - progress) ** 3) * (final - initial) + initial


def inverse_cubic(progress: float, initial: float, final: float) -> float:
    """initial + (1 - (1 - p)^(1/3)) (final - initial): slow at first, fast at the end, for p in [0, 1].

    >>> inverse_cubic(0.875, 0.0, 8.0)
    4.0
    """
    left: float = (1.0 - progress) ** (1.0 / 3.0)
    return (1.0 - left) * (final - initial) + initial


def cyclic_linear(step: float, total: float, cycle: float, initial: float, final: float) -> float:
    """A line from `initial` to `final`, begun anew every `cycle` steps; `step` counts from the start of `total` steps.

    initial - s / (C - 1) (initial - final), with C = cycle and s = step mod C. Past the last whole cycle C is what is
    left, total mod cycle, and s = step mod that C, counted from the very start as SparseML counts it. A cycle of a
    single step stays at `initial`; lengths that are no whole number of steps never go beyond `final`.

    >>> [cyclic_linear(step, 6, 3, 4.0, 2.0) for step in range(6)]
    [4.0, 3.0, 2.0, 4.0, 3.0, 2.0]
    """
    step, total, cycle = _snapped(step), _snapped(total), _snapped(cycle)
    if step > total // cycle * cycle:
        cycle = _snapped(total % cycle)
    if cycle <= 1.0:
        return initial
    return linear(min(1.0, _snapped(step % cycle) / (cycle - 1.0)), initial, final)


def _snapped(count: float) -> float:
    return float(round(count)) if abs(count - round(count)) < _SAME_STEP else count
