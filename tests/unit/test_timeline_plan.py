"""What `recipe plan` says of a run: when everything holds, and the learning rates that training will really set."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparse_accel.modifiers import MODIFIERS
from sparse_accel.recipe.schema import Recipe
from sparse_accel.recipe.timeline_plan import NOMINAL_STEPS, corners, notes, number, table, timeline
from sparse_accel.recipe.timeline_plot import plot
from sparse_accel.timeline import Clock

TUTORIAL = {"num_epochs": 8, "qat_start_epoch": 4.0, "observer_epoch": 7.0}
RATES = """\
m_modifiers:
  - !LearningRateFunctionModifier {start_epoch: 0.5, end_epoch: 1, lr_func: linear, init_lr: 0, final_lr: 1e-3}
  - !LearningRateFunctionModifier {start_epoch: 1, end_epoch: 3, lr_func: cyclic_linear, init_lr: 1e-3, final_lr: 1e-4}
  - !LearningRateFunctionModifier
    start_epoch: 3
    end_epoch: 4
    lr_func: cosine
    init_lr: 5e-4
    final_lr: 0
    param_groups: [0]
  - !SetLearningRateModifier {start_epoch: 3.3, learning_rate: 2e-5, param_groups: [1]}
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 5}
"""


def test_the_tutorials_run_in_epochs_and_steps() -> None:
    plan = timeline(Recipe.load("question_answering/pruned_quant", TUTORIAL), 8.0, 1000)
    headings, rows = table(plan)
    assert headings == ["epochs", "steps", "learning rate", "QAT"]
    assert rows == [
        ["0 - 4", "0 - 4,000", "1.75e-4 → 8.75e-5", "-"],
        ["4 - 7", "4,000 - 7,000", "8.75e-5 → 2.19e-5", "ranges move"],
        ["7 - 8", "7,000 - 8,000", "2.19e-5 → 0", "ranges fixed"],
    ]
    assert notes(plan)[:3] == [
        "zeros: held in the whole run",
        "teacher: hardness 1, T 5 in the whole run",
        "weight decay: 0 in the whole run",
    ]


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 7, 20])
def test_rates_are_those_that_training_sets(steps_per_epoch: int) -> None:
    recipe = Recipe.load(RATES)
    plan = timeline(recipe, 5.0, steps_per_epoch)
    assert plan.groups == (0, 1)
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in plan.groups]
    optimizer = torch.optim.SGD([{"params": [parameter]} for parameter in parameters], lr=0.5)
    session: Any = SimpleNamespace(optimizer=optimizer)
    step = 0
    for stretch in plan.stretches:
        assert stretch.first.step == step, "no step is in two stretches, and none in none"
        while step < stretch.end.step:
            clock = Clock(step, steps_per_epoch)
            recipe.on_step_start(session, clock)
            planned = [0.5 if rate is None else rate.learning_rate_at(clock) for rate in stretch.rates]
            assert planned == [group["lr"] for group in optimizer.param_groups]
            step += 1
    assert step == plan.total_steps == 5 * steps_per_epoch


def test_a_stretch_goes_from_corner_to_corner() -> None:
    plan = timeline(Recipe.load(RATES), 5.0, 20)
    assert [corners(stretch, 0) for stretch in plan.stretches] == [
        None,
        (0.0, 1e-3),
        (1e-3, 1e-4),
        (5e-4, pytest.approx(3.97e-4, rel=1e-2)),
        (pytest.approx(3.97e-4, rel=1e-2), 0.0),
        (0.0, 0.0),
    ]
    _, rows = table(plan)
    assert [row[2] for row in rows][:3] == ["flags", "0 → 1e-3", "1e-3 → 1e-4 every 1"]
    assert notes(plan) == ["flags: --learning_rate says the learning rate there"]


def test_moments_that_change_nothing_do_not_divide_a_run() -> None:
    text = "m_modifiers:\n  - !EpochRangeModifier {start_epoch: 0.5, end_epoch: 2}\n"
    text += "  - !SetWeightDecayModifier {start_epoch: 1, weight_decay: 0.1}\n"
    plan = timeline(Recipe.load(text), 2.0, 10)
    assert [(stretch.first.step, stretch.end.step) for stretch in plan.stretches] == [(0, 10), (10, 20)]
    assert table(plan) == (
        ["epochs", "steps", "learning rate", "weight decay"],
        [["0 - 1", "0 - 10", "flags", "-"], ["1 - 2", "10 - 20", "flags", "0.1"]],
    )


PRUNING = """\
m_modifiers:
  - !GMPruningModifier
    start_epoch: 1
    end_epoch: 3
    update_frequency: 0.5
    init_sparsity: 0.0
    final_sparsity: 0.8
    params: __ALL_PRUNABLE__
    inter_func: linear
    leave_enabled: {leave}
  - !SetWeightDecayModifier {{start_epoch: 2, weight_decay: 0.1}}
  - !EpochRangeModifier {{start_epoch: 0, end_epoch: 4}}
"""


@pytest.mark.parametrize(("leave", "last"), [("true", "80.0%"), ("false", "-")])
def test_gradual_pruning_goes_from_sparsity_to_sparsity(leave: str, last: str) -> None:
    headings, rows = table(timeline(Recipe.load(PRUNING.format(leave=leave)), 4.0, 10))
    assert headings == ["epochs", "steps", "learning rate", "zeros", "weight decay"]
    zeros = [(row[0], row[3]) for row in rows]
    assert zeros == [("0 - 1", "-"), ("1 - 2", "0.0% → 40.0%"), ("2 - 3", "40.0% → 80.0%"), ("3 - 4", last)]


def test_gradual_pruning_is_drawn(tmp_path: Path) -> None:
    text = PRUNING.format(leave="true").replace("final_sparsity: 0.8", "final_sparsity: {0.7: ['re:a'], 0.9: [b]}")
    plot(timeline(Recipe.load(text.replace("__ALL_PRUNABLE__", "[]")), 4.0, 10), tmp_path / "plan.svg", "a title")
    assert (tmp_path / "plan.svg").read_text().count("<path") > 10


def test_without_data_there_are_no_steps() -> None:
    headings, rows = table(timeline(Recipe.load("question_answering/dense"), 3.0, NOMINAL_STEPS))
    assert headings == ["epochs", "learning rate"]
    assert rows == [["0 - 0.033", "0 → 5e-5"], ["0.033 - 3", "5e-5 → 0"]]


def test_what_a_short_run_skips_is_named() -> None:
    text = "m_modifiers:\n  - !DistillationModifier {start_epoch: 0.2, end_epoch: 0.4}\n"
    text += "  - !QuantizationModifier {start_epoch: 0.9}\n"
    never, late = timeline(Recipe.load(text), 1.0, 2).warnings
    assert never == "<recipe>:2: DistillationModifier: epochs 0.2 to 0.4 hold no optimizer step (2 an epoch)"
    assert late.startswith("<recipe>:3: QuantizationModifier: starts at epoch 0.9, after the last step has begun")
    assert timeline(Recipe.load(text), 1.0, 1000).warnings == ()


# Every modifier, in force from epoch 1 on where it can be, and what the plan shows of it.
SHOWN = {
    "ConstantPruningModifier": ("start_epoch: 1, params: __ALL_PRUNABLE__", "zeros"),
    "DistillationModifier": ("start_epoch: 1", "teacher"),
    "EpochRangeModifier": ("start_epoch: 0, end_epoch: 3", "0 - 3"),
    "GMPruningModifier": (
        "start_epoch: 1, end_epoch: 2, init_sparsity: 0.05, final_sparsity: 0.8, update_frequency: 0.1, params: []",
        "5.0% → 80.0%",
    ),
    "GlobalMagnitudePruningModifier": (
        "start_epoch: 1, end_epoch: 2, init_sparsity: 0.0, final_sparsity: 0.5, update_frequency: -1, inter_func: linear",
        "__ALL_PRUNABLE__: pruned together by magnitude, linear, at every step",
    ),
    "LearningRateFunctionModifier": (
        "start_epoch: 1, end_epoch: 2, lr_func: linear, init_lr: 1e-5, final_lr: 2e-5",
        "1e-5 → 2e-5",
    ),
    "MagnitudePruningModifier": (
        "start_epoch: 1, end_epoch: 3, init_sparsity: __FROM_PARAM__, final_sparsity: {0.7: ['re:a'], 0.9: [b]}, "
        "update_frequency: 0.5, mask_type: block4, leave_enabled: False",
        "own zeros → 70.0% and own zeros → 90.0%",
    ),
    "QuantizationModifier": ("start_epoch: 1", "ranges move"),
    "SetLearningRateModifier": ("start_epoch: 1, learning_rate: 3e-5", "3e-5"),
    "SetWeightDecayModifier": ("start_epoch: 1, weight_decay: 0.25", "0.25"),
    "TrainableParamsModifier": ("params: ['re:x'], trainable: false", "parameters: re:x do not learn"),
}


def test_every_modifier_shows() -> None:
    assert set(SHOWN) == set(MODIFIERS), "a new modifier needs a place in recipe/timeline_plan.py"
    start = "m_modifiers:\n  - !SetWeightDecayModifier {start_epoch: 0, weight_decay: 0}\n"
    for name, (fields, shown) in SHOWN.items():
        plan = timeline(Recipe.load(start + f"  - !{name} {{{fields}}}\n"), 3.0, 10)
        headings, rows = table(plan)
        cells = [*headings, *(cell for row in rows for cell in row), *notes(plan)]
        assert shown in cells, name


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1.75e-4, "1.75e-4"), (5e-5, "5e-5"), (1e-10, "1e-10"), (0.01, "0.01"), (1.0, "1")]
)
def test_numbers_are_written_as_people_write_them(value: float, text: str) -> None:
    assert number(value) == text
    assert float(text) == value


def test_a_drawing_is_what_its_name_says(tmp_path: Path) -> None:
    plan = timeline(Recipe.load(RATES + "  - !DistillationModifier {start_epoch: 1, end_epoch: 2}\n"), 5.0, 20)
    plot(plan, tmp_path / "plan.svg", "a title")
    assert ElementTree.parse(tmp_path / "plan.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
