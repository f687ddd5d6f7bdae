"""What `recipe check` finds: everything at once, each with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_accel.errors import RecipeError
from sparse_accel.modifiers import MODIFIERS
from sparse_accel.recipe import shipped
from sparse_accel.recipe.checking import check_recipe
from sparse_accel.recipe.schema import Recipe

MANY = """\
num_epochs: 8
a: eval(b)
b: eval(a)
training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: eval(num_epoch)
  - !LearningRateFunctionModifer
    start_epoch: eval(a)
  - !SetWeightDecayModifier
    weight_decays: 0.1
  - !SetLearningRateModifier
    learning_rate: 7
  - !QuantizationModifier {start_epoch: 1}
  - SetLearningRateModifier
  - !QuantizationModifier {start_epoch: eval(b)}
  - !QuantizationModifier {start_epoch: 2}
stray: {inner: !EpochRangeModifier {}}
"""


def ranged(modifier: str, end: float = 3.0) -> str:
    return f"m_modifiers:\n  - !EpochRangeModifier {{start_epoch: 0, end_epoch: {end}}}\n  - !{modifier}\n"


def test_every_problem_is_found_once_and_in_the_order_of_lines() -> None:
    found = check_recipe(MANY, "num_epochs=3,nothing=1")
    said = [str(problem) for problem in found.problems]
    assert found.recipe is None
    assert [line.split(": ")[0] for line in said] == [
        "recipe_args",
        *(f"<recipe>:{line}" for line in (3, 7, 8, 11, 13, 15, 17, 18)),
    ]
    for text, line in zip(
        (
            "the recipe has no variable 'nothing'",
            "in a circle: a -> b -> a",
            "'num_epoch' is not defined; did you mean 'num_epochs'?",
            "there is no modifier 'LearningRateFunctionModifer'; did you mean 'LearningRateFunctionModifier'",
            "there is no field 'weight_decays'; did you mean 'weight_decay'?",
            "learning_rate must be less than or equal to 1; got 7",
            "must be a modifier with its tag",
            "and the QuantizationModifier at <recipe>:14 both set quant at the same time",
            "EpochRangeModifier stands under 'stray'",
        ),
        said,
        strict=True,
    ):
        assert text in line


def test_loading_says_all_of_it_too() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(MANY)
    assert sorted(str(caught.value).splitlines()) == sorted(map(str, check_recipe(MANY).problems))


def test_a_variable_that_cannot_be_had_is_one_problem() -> None:
    text = "a: eval(1 / 0)\nb: eval(a + 1)\nm_modifiers:\n  - !SetWeightDecayModifier {weight_decay: eval(b)}\n"
    assert [str(problem) for problem in check_recipe(text).problems] == [
        "<recipe>:1: eval(1 / 0): division by zero",
    ]


def test_text_that_is_no_yaml_is_one_problem_at_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("a: 1\nb: [1\nc: 2\n", "utf-8")
    (problem,) = check_recipe(str(path)).problems
    assert str(problem).startswith(f"{path}:3: not valid YAML")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            ranged("SetWeightDecayModifier {weight_decay: 0, start_epoch: 5}"),
            "starts at epoch 5.0, but training ends at",
        ),
        (ranged("QuantizationModifier {start_epoch: 3}"), "starts at epoch 3, and training does not go on"),
        (
            ranged("QuantizationModifier {start_epoch: 2, disable_quantization_observer_epoch: 1}"),
            "must be start_epoch (2.0) or later",
        ),
    ],
)
def test_what_starts_after_the_end_is_a_problem(text: str, said: str) -> None:
    (problem,) = check_recipe(text).problems
    assert str(problem).startswith("<recipe>:3: ")
    assert said in str(problem)


def test_a_pattern_of_quantized_modules_that_is_none_is_found_without_a_model() -> None:
    text = "m_modifiers:\n  - !QuantizationModifier\n    start_epoch: 0\n    submodules: ['re:[']\n"
    (problem,) = check_recipe(text).problems
    assert str(problem).startswith(
        "<recipe>:4: QuantizationModifier: submodules has a bad pattern: 're:[' is not a regular expression: "
    )


@pytest.mark.parametrize(
    ("pruned", "held", "knob"),
    [
        ("__ALL_PRUNABLE__", "__all_prunable__", "mask:__ALL_PRUNABLE__"),
        ("[]", "['re:.*bias', __ALL_PRUNABLE__]", "mask:__ALL_PRUNABLE__"),
        ("['re:.*query.weight']", "['re:.*query.weight']", "mask:re:.*query.weight"),
        ("['re:.*query.weight']", "__ALL__", "mask:re:.*query.weight"),
    ],
)
def test_two_masks_on_the_same_weights_are_found_without_a_model(pruned: str, held: str, knob: str) -> None:
    text = ranged(
        "GMPruningModifier {start_epoch: 0, end_epoch: 2, init_sparsity: 0.1, final_sparsity: 0.8, update_frequency: 1, "
        f"params: {pruned}}}\n  - !ConstantPruningModifier {{start_epoch: 0.5, params: {held}}}"
    )
    (problem,) = check_recipe(text).problems
    assert str(problem) == (
        "<recipe>:4: ConstantPruningModifier and the GMPruningModifier at <recipe>:3 "
        f"both set {knob} at the same time; let one end before the other starts"
    )
    of_others = text.replace(f"0.5, params: {held}", "0.5, params: ['re:.*key.weight']")
    assert check_recipe(of_others).problems == [], "only a model knows which weights different patterns mean"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "spare: 1\n" + ranged("SetWeightDecayModifier {weight_decay: 0}"),
            "<recipe>:1: the variable 'spare' is not used",
        ),
        (ranged("SetWeightDecayModifier {weight_decay: 0, constant_logging: 1}"), "constant_logging is ignored: "),
        (ranged("QuantizationModifier {num_calibration_steps: 4}"), "num_calibration_steps has no effect: "),
        (ranged("QuantizationModifier {model_fuse_fn_name: no_fuse}"), "model_fuse_fn_name has no effect: "),
        (
            ranged("QuantizationModifier {start_epoch: 1, disable_quantization_observer_epoch: 3}"),
            "disable_quantization_observer_epoch 3 is not reached, training ends at 3",
        ),
        (
            ranged("QuantizationModifier {start_epoch: 3.5}"),
            "names epoch 3.5, past the EpochRangeModifier's end at 3: training goes on to epoch 4",
        ),
    ],
)
def test_what_is_said_in_vain_is_a_warning(text: str, said: str) -> None:
    found = check_recipe(text)
    assert found.recipe is not None and not found.problems
    (warning,) = found.warnings
    assert said in warning


@pytest.mark.parametrize("name", shipped.names())
def test_shipped_recipes_have_nothing_wrong_and_say_what_they_are_for(name: str) -> None:
    found = check_recipe(name)
    assert (found.problems, found.warnings) == ([], [])
    assert 10 < len(shipped.purpose(name)) <= 47, "`recipe list` has one line for it"


@pytest.mark.parametrize("name", sorted(MODIFIERS))
def test_fields_without_effect_are_fields(name: str) -> None:
    assert set(MODIFIERS[name].idle_fields) <= set(MODIFIERS[name].model_fields)
