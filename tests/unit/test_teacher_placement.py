"""Where a teacher goes: what is estimated, what is chosen, what is refused, and layers on several devices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_accel.errors import ModelError, OptionError
from sparse_accel.runtime.options import TEACHER_PLACEMENTS
from sparse_accel.runtime.teachers import PLACEMENTS
from sparse_accel.runtime.teachers.device_map import layer_map, spread
from sparse_accel.runtime.teachers.fitting import (
    SPREAD_BY,
    Machine,
    Sizes,
    choose,
    estimate,
    layer_activations,
    obstacle,
    student_bytes,
)
from sparse_accel.runtime.teachers.placed import PlacedTeacher
from sparse_accel.runtime.teachers.placing import decide
from sparse_accel.runtime.teachers.replicated import replicated
from sparse_accel.runtime.teachers.units import blocks, largest_gather, num_bytes, units
from tests.tiny import tiny_bert

GB = 10**9
# A teacher of 12 GB whose largest layer has 1 GB, beside a student that needs 5.
SIZES = Sizes(teacher=12 * GB, largest_gather=GB, activations=GB, student=5 * GB)
ALONE = Machine(num_processes=1, processes_per_node=1, num_devices=1, free=24 * GB)
EIGHT = Machine(num_processes=8, processes_per_node=8, num_devices=8, free=24 * GB)
ACCEPTED = frozenset({"input_ids", "attention_mask", "token_type_ids"})
RANK = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", num_processes=1)


def load(folder: Path) -> Any:
    from transformers import AutoModelForQuestionAnswering

    return AutoModelForQuestionAnswering.from_pretrained(folder)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 90, (3, 12), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "start_positions": torch.zeros(3)}


def test_every_placement_can_be_asked_for() -> None:
    assert ("auto", *PLACEMENTS) == TEACHER_PLACEMENTS
    assert set(estimate(SIZES, replace(EIGHT, processes_per_node=1))) == set(PLACEMENTS)


def test_the_estimate_adds_up() -> None:
    assert estimate(SIZES, ALONE) == {"replicated": 18 * GB}
    assert estimate(SIZES, replace(ALONE, num_devices=4)) == {"replicated": 18 * GB, "device_map": 6 * GB}
    sharded = int(5 * GB + GB + 1.5 * GB + 2 * GB)
    assert estimate(SIZES, EIGHT) == {"replicated": 18 * GB, "fsdp2": sharded, "zero3": sharded}


@given(
    teacher=st.integers(1, 10**12),
    part=st.floats(0.01, 0.5),
    processes=st.integers(2, 512),
    student=st.integers(0, 10**12),
)
def test_more_processes_never_need_more_memory(teacher: int, part: float, processes: int, student: int) -> None:
    sizes = Sizes(teacher, int(part * teacher), 0, student)
    few, many = (Machine(number, number, 1, 0) for number in (processes, 2 * processes))
    assert estimate(sizes, many)["fsdp2"] <= estimate(sizes, few)["fsdp2"]
    assert estimate(sizes, many)["replicated"] == estimate(sizes, few)["replicated"] == teacher + student


@pytest.mark.parametrize(
    ("machine", "chosen"),
    [
        (ALONE, "replicated"),
        (replace(ALONE, free=19 * GB), None),  # it would fit, but for the tenth that stays free
        (replace(ALONE, free=10 * GB, num_devices=4), "device_map"),
        (EIGHT, "replicated"),
        (replace(EIGHT, free=12 * GB), "fsdp2"),
        (replace(EIGHT, free=12 * GB, num_processes=1, processes_per_node=1), "device_map"),
        (replace(EIGHT, free=8 * GB), None),
    ],
)
def test_the_quickest_placement_that_fits_is_chosen(machine: Machine, chosen: str | None) -> None:
    assert choose(estimate(SIZES, machine), machine) == chosen


def test_a_teacher_that_fits_nowhere_is_refused_with_the_estimate() -> None:
    small = replace(EIGHT, free=8 * GB)
    with pytest.raises(ModelError) as refusal:
        decide("auto", estimate(SIZES, small), SIZES, small)
    for shown in ("does not fit", "with replicated", "18.0 GB", "with fsdp2", "9.5 GB", "free", "8.0 GB"):
        assert shown in str(refusal.value)


def test_a_placement_that_is_asked_for_is_not_overruled_by_an_estimate() -> None:
    small = replace(EIGHT, free=1 * GB)
    assert decide("replicated", estimate(SIZES, small), SIZES, small) == "replicated"


@pytest.mark.parametrize(
    ("placement", "machine", "message"),
    [
        ("fsdp2", ALONE, "there is only one; start several"),
        ("zero3", ALONE, "there is only one; start several"),
        ("device_map", ALONE, "nothing to spread the teacher over"),
        ("device_map", EIGHT, "8 processes share this one; start one process per node"),
    ],
)
def test_a_placement_that_a_launch_cannot_have_says_why(placement: str, machine: Machine, message: str) -> None:
    with pytest.raises(OptionError, match=f"--teacher_placement {placement}: .*{message}"):
        decide(placement, {}, SIZES, machine)


def test_one_process_per_node_may_spread_over_its_devices() -> None:
    assert obstacle("device_map", replace(EIGHT, num_processes=2, processes_per_node=1)) is None


@pytest.mark.parametrize(
    ("backend", "share"), [("ddp", 160), ("zero1", 100), ("zero2", 70), ("zero3", 40), ("fsdp", 40)]
)
def test_a_rank_holds_what_its_backend_does_not_spread(backend: str, share: int) -> None:
    """40 of weights, of gradients and of each Adam moment, on 4 ranks."""
    assert student_bytes(40, 40, num_moments=2, spread=SPREAD_BY[backend], num_processes=4) == share


def test_frozen_weights_have_no_gradient_and_no_moments() -> None:
    assert student_bytes(40, 10, num_moments=2, spread=(), num_processes=1) == 40 + 10 + 20


def test_activations_grow_with_the_square_of_the_length() -> None:
    short, long = (layer_activations(hidden=1, heads=8, batch=1, length=length) for length in (512, 1024))
    assert 2 < long / short < 4


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra", "albert"])
def test_the_units_of_a_model_do_not_overlap_and_are_most_of_it(kind: str, tmp_path: Path) -> None:
    model = load(tiny_bert(tmp_path, kind=kind, layers=4, hidden=64))
    owned = [id(parameter) for unit in units(model) for parameter in unit.parameters()]
    assert len(owned) == len(set(owned))
    assert len(blocks(model)) == (1 if kind == "albert" else 4)
    assert largest_gather(model) < num_bytes(model) * (1 if kind == "albert" else 0.6)


def test_a_model_without_layers_is_not_spread() -> None:
    with pytest.raises(ModelError, match="Linear has no list of layers"):
        units(nn.Linear(2, 2))


def test_the_first_device_is_left_to_the_student(tmp_path: Path) -> None:
    model = load(tiny_bert(tmp_path, layers=4))
    size = num_bytes(model)
    assert set(layer_map(model, {0: size * 2, 1: size * 2}).values()) == {1}
    assert set(layer_map(model, {0: size * 2, 1: size, 2: size}).values()) == {1, 2}
    both = layer_map(model, {0: int(size * 0.9), 1: int(size * 0.7)})
    assert set(both.values()) == {0, 1}
    assert all(name.count(".") <= 3 for name in both), "no layer is torn apart"
    with pytest.raises(ModelError, match="does not fit on the devices"):
        layer_map(model, {0: size // 4, 1: size // 4})


def test_layers_on_two_devices_answer_as_on_one(tmp_path: Path) -> None:
    """On a machine without GPUs: the word and the device are two places to accelerate, and weights travel from the word's."""
    folder = tiny_bert(tmp_path, layers=4)
    expected = replicated(load(folder), RANK, ACCEPTED)(batch())
    model = load(folder)
    size = num_bytes(model)
    places = {0: torch.device("cpu"), 1: "cpu"}
    placed = {
        name: places[device] for name, device in layer_map(model, {0: int(size * 0.9), 1: int(size * 0.7)}).items()
    }
    teacher = PlacedTeacher(spread(model, placed), RANK, ACCEPTED)
    assert any(parameter.is_meta for parameter in model.parameters())
    outputs = teacher(batch())
    assert set(outputs) == {"start_logits", "end_logits"}
    for key, value in outputs.items():
        assert torch.equal(value, expected[key])
        assert value.device.type == "cpu" and not value.requires_grad


def test_a_teacher_computes_in_the_runs_precision_and_answers_in_fp32(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    exact = replicated(load(folder), RANK, ACCEPTED)(batch())["start_logits"]
    half = SimpleNamespace(**{**vars(RANK), "mixed_precision": "bf16"})
    rounded = replicated(load(folder), half, ACCEPTED)(batch())["start_logits"]
    assert exact.dtype == rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, atol=0.05, rtol=0.05)
