"""The comparison with Hugging Face's example refuses to time different answers, and gives what a report needs."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("eval_qa")


def test_both_ways_give_the_same_and_a_difference_is_refused(benchmark: Any, tmp_path: Path) -> None:
    world = benchmark._make_world(tmp_path, 40, None)
    assert benchmark._check_same(world)["different"] == 0
    with pytest.raises(RuntimeError, match="version 1: answers differ"):
        benchmark._check_same(replace(world, starts=[-row for row in world.starts]))
    shifted = replace(world.features, extra={"offsets": world.features.extra["offsets"] + 1})
    with pytest.raises(RuntimeError, match="window 0 differs"):
        benchmark._check_same(replace(world, features=shifted))


@pytest.mark.exhaustive
def test_a_measurement_is_plain_data_with_every_sample(benchmark: Any) -> None:
    found = json.loads(json.dumps(benchmark.measure(2, 20)))
    assert (found["workload"], found["questions"], found["rounds"]) == ("eval-qa", 20, 2)
    for arm in found["arms"].values():
        for clock in ("cpu", "wall"):
            assert len(arm[clock]["samples"]) == 2
            assert arm[clock]["min"] <= arm[clock]["median"] <= arm[clock]["max"]
            assert arm["times_as_fast"][clock]["median"] > 0
    assert found["arms"]["windows, HF"]["times_as_fast"]["cpu"]["median"] == 1.0
