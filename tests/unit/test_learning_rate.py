"""The learning rate at every step, against the closed form of SparseML's schedules, and who has the last word."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_accel.compress.plan import CompressionPlan
from sparse_accel.errors import RecipeError
from sparse_accel.modifiers.learning_rate import LearningRateFunctionModifier, SetLearningRateModifier
from sparse_accel.recipe.schema import Recipe
from sparse_accel.session import Session
from sparse_accel.timeline import Clock

OWN_RATE = 0.125


def session_of(recipe: Recipe, groups: int = 2) -> Session:
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(groups)])
    optimizer = torch.optim.SGD([{"params": [parameter]} for parameter in model], lr=OWN_RATE)
    return Session(
        accelerator=None,
        model=model,
        module=model,
        optimizer=optimizer,
        recipe=recipe,
        plan=CompressionPlan(),
        task=None,
        options=None,
        loader=None,
    )


def rates(recipe: Recipe, steps: int, steps_per_epoch: int, group: int = 0) -> list[float]:
    """The learning rate in the optimizer at each step, as the loop sets it: its own first, then the recipe's."""
    session = session_of(recipe)
    seen = []
    for step in range(steps):
        for own in session.optimizer.param_groups:
            own["lr"] = OWN_RATE
        for _ in range(2):  # calling it twice equals calling it once
            recipe.on_step_start(session, Clock(step, steps_per_epoch))
        seen.append(session.optimizer.param_groups[group]["lr"])
    return seen


def modifiers(*entries: str) -> Recipe:
    return Recipe.load("training_modifiers:\n" + "".join(f"  - !{entry}\n" for entry in entries))


def function(lr_func: str, start: float, end: float, init: float, final: float, **more: Any) -> str:
    fields = {"lr_func": lr_func, "start_epoch": start, "end_epoch": end, "init_lr": init, "final_lr": final, **more}
    return "LearningRateFunctionModifier {" + ", ".join(f"{name}: {value}" for name, value in fields.items()) + "}"


def test_the_transfer_recipe_falls_in_a_line_and_never_takes_a_step_at_its_end() -> None:
    recipe = Recipe.load("question_answering/pruned_quant")
    seen = rates(Recipe(recipe.of(LearningRateFunctionModifier), places=("here",)), steps=13 * 7, steps_per_epoch=7)
    assert seen == [1.75e-4 + (step / 7 / 13) * (0 - 1.75e-4) for step in range(13 * 7)]
    assert seen[-1] > 0.0


@pytest.mark.parametrize("steps_per_epoch", [1, 10, 100, 1000])
def test_the_dense_recipe_warms_up_and_then_falls(steps_per_epoch: int) -> None:
    recipe = Recipe.load("question_answering/dense")
    seen = rates(recipe, 3 * steps_per_epoch, steps_per_epoch)
    for step, rate in enumerate(seen):
        epoch = step / steps_per_epoch
        rising, falling = 5e-5 * epoch / 0.033, 5e-5 - 5e-5 * (epoch - 0.033) / (3 - 0.033)
        assert rate == pytest.approx(rising if epoch < 0.033 else falling, rel=1e-12)


def test_a_cosine_follows_half_a_cosine_up_or_down() -> None:
    for init, final in ((1e-3, 1e-5), (1e-5, 1e-3)):
        seen = rates(modifiers(function("cosine", 1, 4, init, final)), 20, 4)
        low, span, phase = min(init, final), abs(init - final), 0.0 if final < init else math.pi
        closed = [low + span / 2 + span / 2 * math.cos((step / 4 - 1) / 3 * math.pi + phase) for step in range(4, 16)]
        assert seen[:4] == [OWN_RATE] * 4
        assert seen[4:16] == pytest.approx(closed)
        assert seen[16:] == [final] * 4


def test_cyclic_linear_restarts_every_cycle_and_shortens_the_last() -> None:
    seen = rates(modifiers(function("cyclic_linear", 0, 2.5, 0.5, 0.1, cycle_epochs=1.0)), 12, 4)
    cycle = [0.5 - s / 3 * 0.4 for s in range(4)]
    assert seen == pytest.approx([*cycle, *cycle, 0.5, 0.1, 0.1, 0.1])


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 40), st.floats(0, 3), st.floats(0.1, 4), st.sampled_from(["linear", "cosine", "cyclic_linear"]))
def test_a_function_is_silent_before_its_start_and_final_after_its_end(
    steps_per_epoch: int, start: float, length: float, lr_func: str
) -> None:
    modifier = LearningRateFunctionModifier.model_validate(
        {"lr_func": lr_func, "init_lr": 0.5, "final_lr": 0.25, "start_epoch": start, "end_epoch": start + length}
    )
    for step in range(8 * steps_per_epoch):
        clock = Clock(step, steps_per_epoch)
        rate = modifier.learning_rate_at(clock)
        if not clock.has_reached(start):
            assert rate is None
        elif clock.has_reached(start + length):
            assert rate == 0.25
        else:
            assert rate is not None and 0.25 - 1e-12 <= rate <= 0.5 + 1e-12


def test_a_rate_that_is_set_holds_until_a_later_start_whatever_the_order_in_the_recipe() -> None:
    entries = [
        "SetLearningRateModifier {learning_rate: 0.5}",
        function("linear", 1, 2, 0.4, 0.2),
        "SetLearningRateModifier {learning_rate: 0.1, start_epoch: 3}",
    ]
    expected = [0.5, 0.5, 0.4, 0.3, 0.2, 0.2, 0.1, 0.1]
    for order in (entries, entries[::-1], [entries[1], entries[2], entries[0]]):
        assert rates(modifiers(*order), 8, 2) == pytest.approx(expected)


def test_the_first_opportunity_comes_before_epoch_zero() -> None:
    recipe = modifiers("SetLearningRateModifier {learning_rate: 0.5}", function("linear", 0, 1, 0.4, 0.0))
    assert rates(recipe, 4, 2) == pytest.approx([0.4, 0.2, 0.0, 0.0])


def test_param_groups_name_the_groups_that_are_set() -> None:
    recipe = modifiers("SetLearningRateModifier {learning_rate: 0.5, param_groups: [1]}")
    assert rates(recipe, 2, 1, group=0) == [OWN_RATE, OWN_RATE]
    assert rates(recipe, 2, 1, group=1) == [0.5, 0.5]
    assert rates(modifiers("SetLearningRateModifier {learning_rate: 0.5, param_groups: []}"), 1, 1, group=0) == [0.5]


def test_a_group_that_is_not_there_is_an_error_with_its_place() -> None:
    recipe = modifiers("SetLearningRateModifier {learning_rate: 0.5, param_groups: [2]}")
    with pytest.raises(RecipeError, match=r"^<recipe>:2: param_groups: there is no group 2; the optimizer has 0 to 1"):
        rates(recipe, 1, 1)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("SetLearningRateModifier {}", "the field 'learning_rate' is missing"),
        ("SetLearningRateModifier {learning_rate: 0}", "learning_rate must be greater than 0; got 0"),
        ("SetLearningRateModifier {learning_rate: 1.5}", "must be less than or equal to 1"),
        ("SetLearningRateModifier {learning_rate: .nan}", "learning_rate must be"),
        ("SetLearningRateModifier {learning_rate: 0.5, end_epoch: 3}", "end_epoch must be -1"),
        ("SetLearningRateModifier {learning_rate: 0.5, param_groups: [-1]}", "must be greater than or equal to 0"),
        (function("linear", 0, 3, 0.5, 1.5), "final_lr must be less than or equal to 1"),
        (function("linear", 0, 3, -0.5, 0.5), "init_lr must be greater than or equal to 0"),
        (function("step", 0, 3, 0.5, 0.5), "lr_func must be 'linear', 'cosine' or 'cyclic_linear'; got 'step'"),
        (function("linear", 3, 3, 0.5, 0.5), "end_epoch must lie after start_epoch"),
        (function("linear", 0, -1, 0.5, 0.5), "end_epoch must be an epoch"),
        (function("linear", -2, 3, 0.5, 0.5), "start_epoch must be an epoch from 0 on"),
        (function("linear", 0, 3, 0.5, 0.5, cycle_epochs=0), "cycle_epochs must be greater than 0"),
    ],
)
def test_fields_out_of_range_are_errors(entry: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        modifiers(entry)
    assert str(caught.value).startswith("<recipe>:2: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (function("linear", 0, 2, 0.5, 0.1), function("linear", 1, 3, 0.5, 0.1)),
        (function("linear", 0, 2, 0.5, 0.1), "SetLearningRateModifier {learning_rate: 0.5, start_epoch: 1}"),
        ("SetLearningRateModifier {learning_rate: 0.5}", "SetLearningRateModifier {learning_rate: 0.4}"),
        (function("linear", 0, 2, 0.5, 0.1), function("linear", 1, 3, 0.5, 0.1, param_groups=[1])),
    ],
)
def test_two_owners_of_the_learning_rate_at_one_time_are_an_error_that_names_both(one: str, other: str) -> None:
    with pytest.raises(RecipeError) as caught:
        modifiers(one, other)
    assert {"<recipe>:2", "<recipe>:3"} <= set(str(caught.value).replace(": ", " ").split())
    assert "both set lr" in str(caught.value)


def test_segments_that_meet_and_groups_apart_are_no_conflict() -> None:
    modifiers(function("linear", 0, 0.1 + 0.2, 0.0, 0.5), function("linear", 0.3, 1, 0.5, 0.0))
    modifiers(
        function("linear", 0, 2, 0.5, 0.1, param_groups=[0]), function("linear", 0, 2, 0.3, 0.1, param_groups=[1])
    )


def test_a_modifier_that_would_never_act_is_a_problem_of_the_run() -> None:
    recipe = modifiers("SetLearningRateModifier {learning_rate: 0.5, start_epoch: 3}", function("linear", 0, 3, 0.5, 0))
    recipe.check(4)
    with pytest.raises(
        RecipeError, match=r"^<recipe>:2: SetLearningRateModifier: starts at epoch 3.0, but training ends"
    ):
        recipe.check(3)
    assert recipe.has(SetLearningRateModifier)
