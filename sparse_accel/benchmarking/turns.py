"""Arms that take turns: all in one process, every other round backwards, so that what drifts hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Called with what goes on, how many turns are done, and of how many.
Progress = Callable[[str, int, int], None]
CLOCKS = ("wall", "cpu")


@dataclass(frozen=True)
class Ratio:
    """Median, lowest and highest of the ratios within rounds."""

    median: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Plain values."""
        return {"median": self.median, "low": self.low, "high": self.high}


def take_turns(
    arms: Mapping[str, Callable[[], None]],
    rounds: int,
    *,
    warm_up: int,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[float]]]:
    """Seconds of each arm in each round, arm -> clock -> [rounds], and the wall seconds of the `warm_up` rounds before,
    arm -> [warm_up], which do not count: an arm's first turn compiles and allocates."""
    seconds: dict[str, dict[str, list[float]]] = {arm: {clock: [] for clock in CLOCKS} for arm in arms}
    before: dict[str, list[float]] = {arm: [] for arm in arms}
    done, total = 0, (warm_up + rounds) * len(arms)
    for number in range(-warm_up, rounds):
        for arm in arms if number % 2 == 0 else reversed(list(arms)):
            if progress is not None:
                progress(f"warming up {arm}" if number < 0 else f"round {number + 1}, {arm}", done, total)
            wall, cpu = timed(arms[arm], device)
            done += 1
            if number < 0:
                before[arm].append(round(wall, 6))
            else:
                seconds[arm]["wall"].append(round(wall, 6))
                seconds[arm]["cpu"].append(round(cpu, 6))
    return seconds, before


def timed(work: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Wall and process seconds of some work, the device's part of it included."""
    wait_for(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wait_for(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(values: Sequence[float], others: Sequence[float]) -> Ratio:
    """`values` over `others`, round by round."""
    found = [value / other for value, other in zip(values, others, strict=True)]
    return Ratio(statistics.median(found), min(found), max(found))


def clock_of(device_type: str) -> str:
    """The clock that ratios are read from: the process's own on a CPU, which others share; the wall's beside a GPU."""
    return "wall" if device_type == "cuda" else "cpu"


def seconds_of(document: Mapping[str, Any], arm: str, clock: str | None = None) -> list[float]:
    """The rounds of an arm in a results document, by the clock that counts there."""
    found: list[float] = document["arms"][arm]["seconds"][clock or document["clock"]]
    return found
