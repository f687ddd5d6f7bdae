"""From raw samples to rates, utilisation and ratios: pure functions of a results document."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparse_accel.benchmarking.models import Load, Size, training_flops
from sparse_accel.benchmarking.turns import Ratio, ratio, seconds_of

Document = Mapping[str, Any]


@dataclass(frozen=True)
class ArmSummary:
    """One arm: features and real tokens a second (medians over rounds, wall), utilisation over each peak, launches and
    syncs a step where they were counted."""

    name: str
    features_per_second: float
    features_low: float
    features_high: float
    tokens_per_second: float
    mfu: dict[str, float]
    hfu: dict[str, float]
    launches: float | None
    syncs: float | None
    over_dense: Ratio | None


def summarise(document: Document, arm: str) -> ArmSummary:
    """What one arm's samples say."""
    told, turn = document["arms"][arm], document["turn"]
    wall = seconds_of(document, arm, "wall")
    median = statistics.median(wall)
    useful, done = flops_of(document, arm)
    processes = document["workload"]["processes"]
    counts, steps = told["counts"], told["steps"]
    return ArmSummary(
        name=arm,
        features_per_second=turn["features"] / median,
        features_low=turn["features"] / max(wall),
        features_high=turn["features"] / min(wall),
        tokens_per_second=turn["tokens"] / median,
        mfu={peak: useful / processes / median / value for peak, value in document["peaks"].items()},
        hfu={peak: done / median / value for peak, value in document["peaks"].items()},
        launches=None if counts is None else counts["launches"] / steps,
        syncs=None if counts is None else counts["syncs"] / steps,
        over_dense=cost(document, arm, "dense"),
    )


def flops_of(document: Document, arm: str) -> tuple[float, float]:
    """Operations of a turn: those that the data of all processes needs, 3 (2 n W + 4 L h sum s^2) over real tokens n; and those
    that the first process did, padding and a live teacher included."""
    size, told, turn = Size(**document["size"]), document["arms"][arm], document["turn"]
    useful = training_flops(size, Load(turn["tokens"], turn["squares"]))
    computed = Load(**told["computed"])
    done = training_flops(size, computed)
    if told["has_teacher"]:
        done += size.forward_flops(computed.tokens, computed.squares)
    return useful, done


def cost(document: Document, arm: str, over: str) -> Ratio | None:
    """Time of an arm over that of another, round by round, by the document's clock; None where one was not measured."""
    if arm not in document["arms"] or over not in document["arms"]:
        return None
    return ratio(seconds_of(document, arm), seconds_of(document, over))


def speedup(document: Document, arm: str, over: str) -> Ratio | None:
    """How many times as fast as another an arm is."""
    return cost(document, over, arm)


def noise(document: Document) -> float | None:
    """How far the ratio of two equal arms was from 1 at most; None where there is one alone."""
    found = cost(document, "dense_again", "dense")
    return None if found is None else max(found.high - 1, 1 - found.low)


def phases_per_step(document: Document, arm: str) -> dict[str, float]:
    """Milliseconds of each phase of an optimizer step."""
    told = document["arms"][arm]
    return {phase: 1000 * seconds / told["steps"] for phase, seconds in told["phases_seconds"].items()}


def collating_speedup(document: Document, ours: str) -> Ratio:
    """How many times as fast as Hugging Face's our collator is."""
    found = document["collating"]["milliseconds_per_32_features"]
    return ratio(found["hugging_face"], found[ours])


def collating_milliseconds(document: Document, ours: str) -> float:
    """Milliseconds per 32 features."""
    return statistics.median(document["collating"]["milliseconds_per_32_features"][ours])
