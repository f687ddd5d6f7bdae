"""A change that makes a step dispatch, allocate or wait for more than it did is seen here, whatever the machine is doing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import step_counts

# What another torch or transformers may do beyond the counts of those that they were taken with.
MARGIN = 1.25

# Reads that only happen on a CPU, where nothing waits: the bounds of a packed batch, once a layer, and the numbers of a grid
# in the forms that are for CPU tensors alone (`compress/kernels/rows.py`).
ON_CPU = {
    "attention.py: attention_by_sequence",
    "packed_products.py: packed_products",
    "ranges.py: forward",
    "rows.py: _put_on_grid",
    "rows.py: rounded",
    "rows.py: rounded_in_place",
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return step_counts.count(tmp_path_factory.mktemp("counts"))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(step_counts.FILE.read_text("utf-8"))
    return document


def numbers(counts: Any, prefix: str = "") -> dict[str, float]:
    """A tree of counts as lines: `arm / operations / forward` -> number."""
    if not isinstance(counts, dict):
        return {prefix: counts}
    return {
        name: number
        for key, value in counts.items()
        for name, number in numbers(value, f"{prefix} / {key}" if prefix else key).items()
    }


def test_a_steady_step_reads_nothing_and_builds_nothing_from_host_numbers(counted: dict[str, Any]) -> None:
    for arm, counts in counted.items():
        assert set(counts["reads"]) <= ON_CPU, f"{arm}: the host reads the device in {counts['reads']}"
        assert counts["from_host"] == 0, arm


def test_a_step_does_what_is_recorded_of_it(counted: dict[str, Any], recorded: dict[str, Any]) -> None:
    is_same = recorded["versions"] == step_counts.versions()
    before, now = numbers(recorded["arms"]), numbers(counted)
    if is_same:
        differing = {name for name in {*before, *now} if before.get(name, 0) != now.get(name, 0)}
    else:
        differing = {name for name in now if now[name] > MARGIN * before.get(name, 0)}
    shown = "\n".join(f"  {name}: {before.get(name, 0):,} -> {now.get(name, 0):,}" for name in sorted(differing))
    assert not differing, f"a step does something else than before:\n{shown}\nif that is meant: {step_counts.COMMAND}"


def test_what_compression_adds_to_a_step_is_bounded(counted: dict[str, Any]) -> None:
    """In operations: masks and distillation add what they need, frozen quantizers less than those that observe."""

    def total(arm: str) -> int:
        return sum(counted[arm]["operations"].values())

    assert total("masks and frozen quantizers") < total("masks and quantizers that observe")
    # One matrix: to its places and back, and the values' part of the gradient; 12 of them.
    assert total("masks, compact") - total("dense") <= 12 * 6
    assert counted["masks, compact"]["operations"]["update"] <= counted["dense"]["operations"]["update"]
    assert all(counts["reductions"]["calls"] <= 2 for counts in counted.values())


def test_every_arm_is_recorded(recorded: dict[str, Any], counted: dict[str, Any]) -> None:
    assert list(recorded["arms"]) == list(counted)
