"""When things happen: fractional epochs for people, optimizer steps for machines, converted in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

# An epoch that was typed as a decimal fraction and the same epoch computed as step / steps_per_epoch may differ in
# the last bits; they are the same moment.
_SAME_MOMENT = 1e-9


def steps_per_epoch(num_batches: int, accumulation: int) -> int:
    """Optimizer steps in one epoch: ceil(batches per rank / accumulation). Raises ValueError for no batches."""
    if num_batches < 1 or accumulation < 1:
        raise ValueError(f"an epoch needs a batch and a positive accumulation, got {num_batches} and {accumulation}")
    return math.ceil(num_batches / accumulation)


@dataclass(frozen=True)
class Clock:
    """The moment before optimizer step `step` (counted from 0)."""

    step: int
    steps_per_epoch: int

    @property
    def epoch(self) -> float:
        """Fractional epochs done: step / steps_per_epoch."""
        return self.step / self.steps_per_epoch

    def step_of(self, epoch: float) -> int:
        """The first step whose epoch is `epoch` or later."""
        return math.ceil(epoch * self.steps_per_epoch - _SAME_MOMENT * self.steps_per_epoch)

    def has_reached(self, epoch: float) -> bool:
        """Whether `epoch` is now or has passed."""
        return self.step >= self.step_of(epoch)

    def next(self) -> Clock:
        """One optimizer step later."""
        return Clock(self.step + 1, self.steps_per_epoch)


@dataclass(frozen=True)
class Interval:
    """Epochs from `start` (inclusive) to `end` (exclusive); an `end` of None never comes."""

    start: float = 0.0
    end: float | None = None

    def contains(self, clock: Clock) -> bool:
        """Whether the clock stands inside."""
        return clock.has_reached(self.start) and (self.end is None or not clock.has_reached(self.end))

    def progress(self, clock: Clock) -> float:
        """How far the clock has come, in [0, 1]. Raises ValueError for an interval without an end."""
        if self.end is None:
            raise ValueError("progress needs an interval with an end")
        if self.end <= self.start:
            return 1.0 if clock.has_reached(self.start) else 0.0
        return min(1.0, max(0.0, (clock.epoch - self.start) / (self.end - self.start)))

    def overlaps(self, other: Interval) -> bool:
        """Whether some moment lies in both."""
        ends = [interval.end if interval.end is not None else math.inf for interval in (self, other)]
        return max(self.start, other.start) < min(ends)
