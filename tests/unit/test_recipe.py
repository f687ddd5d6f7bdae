"""Recipes as a whole: variables, overrides, stages, order, what is refused, and writing one down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForQuestionAnswering

from sparse_accel.compress.plan import CompressionPlan
from sparse_accel.errors import RecipeError
from sparse_accel.modifiers import MODIFIERS, REFUSED
from sparse_accel.modifiers.base import Modifier
from sparse_accel.modifiers.distillation import DistillationModifier
from sparse_accel.modifiers.epoch_range import EpochRangeModifier
from sparse_accel.modifiers.learning_rate import LearningRateFunctionModifier, SetLearningRateModifier
from sparse_accel.modifiers.quantization import QuantizationModifier
from sparse_accel.modifiers.weight_decay import SetWeightDecayModifier
from sparse_accel.recipe import shipped
from sparse_accel.recipe.schema import Recipe
from sparse_accel.tasks import resolve_task

TRANSFER = "question_answering/pruned_quant"


def ranged(end: Any, *variables: str) -> str:
    """A recipe of a single EpochRange that ends at `end`."""
    lines = [*variables, "m_modifiers:", "  - !EpochRangeModifier", "    start_epoch: 0", f"    end_epoch: {end}"]
    return "\n".join(lines) + "\n"


def end_of(text: str, args: Any = None) -> float | None:
    return Recipe.load(text, args).modifiers[0].end_epoch


def error_of(text: str, args: Any = None) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(text, args)
    return str(caught.value)


# --- the shipped recipes -------------------------------------------------------------------------------------------


def test_the_transfer_recipe_says_what_its_users_know() -> None:
    recipe = Recipe.load(TRANSFER)
    assert recipe.num_epochs == 13.0
    assert recipe.warnings == []
    assert dict(recipe.variables) == {
        "num_epochs": 13,
        "init_lr": 1.75e-4,
        "final_lr": 0,
        "qat_start_epoch": 8.0,
        "observer_epoch": 12.0,
        "quantize_embeddings": 1,
        "distill_hardness": 1.0,
        "distill_temperature": 5.0,
        "weight_decay": 0.0,
    }
    assert [type(modifier).__name__ for modifier in recipe.modifiers] == [
        "EpochRangeModifier",
        "LearningRateFunctionModifier",
        "DistillationModifier",
        "ConstantPruningModifier",
        "SetWeightDecayModifier",
        "QuantizationModifier",
    ]
    (quantization,) = recipe.of(QuantizationModifier)
    assert (quantization.start_epoch, quantization.disable_quantization_observer_epoch) == (8.0, 12.0)
    assert quantization.exclude_module_types == ("LayerNorm",)
    assert quantization.submodules == ("bert.embeddings", "bert.encoder", "qa_outputs")
    (distillation,) = recipe.of(DistillationModifier)
    assert (distillation.hardness, distillation.temperature) == (1.0, 5.0)
    assert distillation.distill_output_keys == ("start_logits", "end_logits")


def test_the_tutorials_arguments_shorten_the_transfer_recipe() -> None:
    arguments = '{"num_epochs":8,"qat_start_epoch":4.0,"observer_epoch":7.0}'
    recipe = Recipe.load(TRANSFER, arguments)
    assert recipe.num_epochs == 8.0
    assert isinstance(recipe.variables["num_epochs"], int)
    assert recipe.of(QuantizationModifier)[0].start_epoch == 4.0
    assert recipe.of(LearningRateFunctionModifier)[0].end_epoch == 8.0
    assert recipe == Recipe.load(TRANSFER, "num_epochs=8,qat_start_epoch=4.0,observer_epoch:7.0")
    recipe.check(8)


def test_the_dense_recipe_has_a_warm_up() -> None:
    recipe = Recipe.load("question_answering/dense")
    segments = recipe.of(LearningRateFunctionModifier)
    assert [(s.start_epoch, s.end_epoch, s.init_lr, s.final_lr) for s in segments] == [
        (0.0, 0.033, 0.0, 5e-5),
        (0.033, 3.0, 5e-5, 0.0),
    ]
    assert recipe.num_epochs == 3.0


@pytest.mark.parametrize("name", shipped.names())
def test_shipped_recipes_plan_check_and_survive_being_written_down(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.num_epochs is not None
    recipe.check(recipe.num_epochs)
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    recipe.plan(CompressionPlan(), resolve_task(name.partition("/")[0]).model_class.from_config(config))
    assert Recipe.load(recipe.to_yaml()) == recipe


# --- variables and their overrides ---------------------------------------------------------------------------------


def test_variables_depend_on_each_other_in_any_order() -> None:
    recipe = Recipe.load(ranged("eval(c)", "c: eval(b * 2)", "b: eval(a + 1)", "a: 1"))
    assert dict(recipe.variables) == {"a": 1, "b": 2, "c": 4}
    assert end_of(ranged("eval(c)", "c: eval(b * 2)", "b: eval(a + 1)", "a: 1"), {"a": 2}) == 6.0


def test_an_override_stops_at_what_replaces_it() -> None:
    text = ranged("eval(c)", "c: eval(b * 2)", "b: eval(a + 1)", "a: 1")
    assert end_of(text, {"b": 7, "a": 100}) == 14.0
    assert end_of(text, {"b": "eval(a * 10)"}) == 20.0


def test_an_override_reaches_the_aliases_of_its_variable_only() -> None:
    text = ranged("*n", "n: &n 5", "other: *n")
    assert end_of(text, "n=9") == 9.0
    assert Recipe.load(text, "n=9").variables["other"] == 9
    assert end_of(text, "other=9") == 5.0


def test_lists_and_text_are_passed_on_whole() -> None:
    text = (
        "keys: [logits]\nm_modifiers:\n  - !DistillationModifier\n    distill_output_keys: eval(keys)\n"
        "    hardness: eval(hardness)\nhardness: 5e-1\n"
    )
    (modifier,) = Recipe.load(text).of(DistillationModifier)
    assert (modifier.distill_output_keys, modifier.hardness) == (("logits",), 0.5)
    (modifier,) = Recipe.load(text, '{"keys": ["a", "b"], "hardness": "1e-1"}').of(DistillationModifier)
    assert (modifier.distill_output_keys, modifier.hardness) == (("a", "b"), 0.1)


@pytest.mark.parametrize(
    ("text", "args", "said"),
    [
        (
            ranged("eval(n)", "n: eval(m)", "m: eval(n)"),
            None,
            "<recipe>:2: variables depend on each other in a circle: n -> m -> n",
        ),
        (ranged("eval(n)", "n: eval(n)"), None, "<recipe>:1: variables depend on each other in a circle: n -> n"),
        (
            ranged("eval(num_epoch)", "num_epochs: 3"),
            None,
            "<recipe>:5: the variable 'num_epoch' is not defined; did you mean 'num_epochs'?",
        ),
        (ranged(3, "unused: eval(x)"), None, "<recipe>:1: the variable 'x' is not defined"),
        (ranged("eval(n / 0)", "n: 1"), None, "<recipe>:5: eval(n / 0): division by zero"),
        (ranged("eval(n)  + 1", "n: 1"), None, "eval(...) must enclose the whole value"),
        (
            ranged("eval(n)", "n: [1]"),
            None,
            "<recipe>:5: EpochRangeModifier: end_epoch must be a valid number; got [1]",
        ),
        (
            ranged(3, "num_epochs: 3"),
            "num_epoch=1",
            "recipe_args: the recipe has no variable 'num_epoch'; did you mean 'num_epochs'?",
        ),
        (ranged(3), "n=1", "recipe_args: the recipe has no variable 'n'; the recipe has no variables"),
        (ranged(3, "n: 1"), "m_modifiers=1", "recipe_args: 'm_modifiers' is a list of modifiers"),
        (ranged("eval(n)", "n: 1"), "n=abc", "EpochRangeModifier: end_epoch must be a valid number"),
        (ranged("eval(n)", "n: 1"), {"n": "eval(1 / 0)"}, "recipe_args n: eval(1 / 0): division by zero"),
        (ranged("eval(n)", "n: 1"), '["n"]', "recipe_args: needs a JSON object"),
    ],
)
def test_what_is_wrong_with_variables_is_said_with_its_place(text: str, args: Any, said: str) -> None:
    assert said in error_of(text, args)


def test_a_chain_of_variables_that_never_ends_is_an_error_not_a_crash() -> None:
    chain = [f"v{i}: eval(v{i + 1})" for i in range(3000)]
    assert "the chain of variables is too long" in error_of(ranged("eval(v0)", *chain, "v3000: 1"))


def test_variables_that_nothing_uses_are_named_once() -> None:
    text = ranged("eval(n)", "version: 1.1.0", "n: 3", "extra: 1", "__metadata__: {a: 1}")
    assert Recipe.load(text).warnings == ["<recipe>:3: the variable 'extra' is not used"]
    assert Recipe.load(text, "extra=2").warnings == [
        "recipe_args sets 'extra', which nothing in the recipe uses (<recipe>:3)"
    ]


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 10**6) | st.floats(0.1, 1e6), st.sampled_from(["json", "pairs", "mapping"]))
def test_every_way_of_giving_a_number_gives_that_number(number: float, way: str) -> None:
    arguments: Any = {"json": f'{{"n": {number}}}', "pairs": f"n={number}", "mapping": {"n": number}}[way]
    assert end_of(ranged("eval(n)", "n: 1"), arguments) == number


# --- where modifiers may stand -------------------------------------------------------------------------------------


def test_stages_become_one_schedule_and_hide_the_variables_around_them() -> None:
    text = """\
length: 3
rate: eval(length / 10)
first:
  length: 2
  a_modifiers:
    - !EpochRangeModifier {start_epoch: 0, end_epoch: eval(length)}
    - !SetLearningRateModifier {learning_rate: eval(rate)}
second:
  b_modifiers:
    - !EpochRangeModifier {start_epoch: 2, end_epoch: eval(length)}
"""
    recipe = Recipe.load(text)
    assert [modifier.end_epoch for modifier in recipe.modifiers] == [2.0, 3.0, None]
    assert recipe.of(SetLearningRateModifier)[0].learning_rate == 0.3
    overridden = Recipe.load(text, "length=5")
    assert [modifier.end_epoch for modifier in overridden.modifiers] == [5.0, 5.0, None]
    assert overridden.of(SetLearningRateModifier)[0].learning_rate == 0.5


def test_any_name_with_modifiers_in_it_is_a_group_and_an_empty_one_is_none() -> None:
    recipe = Recipe.load("xmodifiersx:\n  - !EpochRangeModifier {start_epoch: 0, end_epoch: 1}\nmodifiers:\n")
    assert len(recipe.modifiers) == 1
    assert Recipe.load("!EpochRangeModifier\n  start_epoch: 0\n  end_epoch: 4\n").num_epochs == 4.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\n", "<recipe>:1: the recipe has no modifiers"),
        ("a_modifiers: []\n", "<recipe>:1: the recipe has no modifiers"),
        ("- !EpochRangeModifier\n  start_epoch: 0\n", "<recipe>:1: a recipe is a mapping of variables and of lists"),
        ("some\ntext\n", "<recipe>:1: a recipe is a mapping"),
        ("mods:\n  - !EpochRangeModifier\n    start_epoch: 0\n", "<recipe>:2: EpochRangeModifier stands under 'mods'"),
        ("x: 1\ny: {z: !EpochRangeModifier {}}\n", "<recipe>:2: EpochRangeModifier stands under 'y'"),
        (
            "m_modifiers:\n  - !EpochRangeModifier\n    start_epoch: !SetWeightDecayModifier {}\n",
            "<recipe>:3: SetWeightDecayModifier stands here as a value",
        ),
        (
            "m_modifiers:\n  - EpochRangeModifier\n",
            "<recipe>:2: an item here must be a modifier with its tag, such as '- !EpochRangeModifier'",
        ),
        ("m_modifiers:\n  - SetWeightDecayModifier:\n      weight_decay: 0\n", "such as '- !SetWeightDecayModifier'"),
        (
            "m_modifiers:\n  EpochRangeModifier:\n    start_epoch: 0\n",
            "<recipe>:1: 'm_modifiers' is not a list; this looks like a recipe of SparseML's session API",
        ),
        (
            "test_stage:\n  quant_modifiers:\n    GPTQModifier:\n      sequential_update: false\n",
            "<recipe>:2: 'quant_modifiers' is not a list",
        ),
        (
            "m_modifiers:\n  - !EpochRangeModifer\n",
            "<recipe>:2: there is no modifier 'EpochRangeModifer'; did you mean 'EpochRangeModifier'",
        ),
        (
            "m_modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0\n    end_epoc: 3\n",
            "<recipe>:4: EpochRangeModifier: there is no field 'end_epoc'; did you mean 'end_epoch'",
        ),
        (
            "m_modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0\n",
            "<recipe>:2: EpochRangeModifier: the field 'end_epoch' is missing",
        ),
        (
            "m_modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0\n    end_epoch: [3]\n",
            "<recipe>:4: EpochRangeModifier: end_epoch must be a valid number; got [3]",
        ),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(text: str, said: str) -> None:
    assert said in error_of(text)


def test_a_word_where_a_list_belongs_is_told_so() -> None:
    said = error_of("m_modifiers:\n  - !DistillationModifier\n    distill_output_keys: logits\n")
    assert said == "<recipe>:3: DistillationModifier: distill_output_keys must be a list; got 'logits'"


def test_all_problems_of_one_modifier_are_said_at_once() -> None:
    text = "m_modifiers:\n  - !EpochRangeModifier\n    start: 0\n    end: 3\n"
    assert [line.split(": ")[0] for line in error_of(text).splitlines()] == ["<recipe>:3", "<recipe>:4"]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_sparsemls_other_modifiers_are_refused_with_what_to_use_instead(name: str) -> None:
    assert name not in MODIFIERS
    said = error_of(f"m_modifiers:\n  - !{name}\n    start_epoch: 0\n")
    assert said == f"<recipe>:2: {name} is not offered here: {REFUSED[name]}"


def test_log_types_is_accepted_with_a_warning() -> None:
    recipe = Recipe.load(ranged(3) + "    log_types: __ALL__\n")
    assert recipe.warnings == [
        "<recipe>:5: EpochRangeModifier: log_types is ignored: what is logged does not depend on the recipe"
    ]


def test_two_quantizations_are_a_conflict_that_names_both_lines() -> None:
    said = error_of(
        "m_modifiers:\n  - !QuantizationModifier {start_epoch: 1}\n  - !QuantizationModifier {start_epoch: 2}\n"
    )
    assert said.startswith("<recipe>:3: ")
    assert "<recipe>:2" in said


# --- the run -------------------------------------------------------------------------------------------------------


def test_check_lists_every_problem_with_its_line() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(TRANSFER, "qat_start_epoch=13,observer_epoch=12.5").check(13)
    said = str(caught.value).splitlines()
    assert len(said) >= 2
    place = str(shipped.find(TRANSFER))
    assert all(line.startswith(f"{place}:") for line in said)
    assert any("starts at epoch 13," in line for line in said)
    assert any("disable_quantization_observer_epoch" in line for line in said)


def test_places_are_those_of_the_modifiers(tmp_path: Path) -> None:
    path = tmp_path / "recipe.md"
    path.write_text(
        "---\n" + ranged(3) + "  - !SetWeightDecayModifier {weight_decay: 0}\n---\ntext\n", encoding="utf-8"
    )
    recipe = Recipe.load(str(path))
    assert [recipe.where(modifier) for modifier in recipe.modifiers] == [f"{path}:3", f"{path}:6"]


def test_the_empty_recipe_asks_for_nothing() -> None:
    recipe = Recipe.empty()
    plan = CompressionPlan()
    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    recipe.plan(plan, BertForQuestionAnswering(config))
    recipe.check(3)
    assert recipe.num_epochs is None
    assert plan.modules == {}
    assert not recipe.has(EpochRangeModifier)


# --- writing a recipe down -----------------------------------------------------------------------------------------

epochs = st.none() | st.floats(0, 20, allow_nan=False) | st.integers(0, 20)
rates = st.floats(1e-9, 1.0)
groups = st.none() | st.lists(st.integers(0, 3), min_size=1, unique=True).map(tuple)


@st.composite
def functions(draw: st.DrawFn) -> Modifier:
    start = draw(st.none() | st.floats(0, 10))
    return LearningRateFunctionModifier(
        lr_func=draw(st.sampled_from(["linear", "cosine", "cyclic_linear"])),
        init_lr=draw(rates),
        final_lr=draw(rates),
        start_epoch=start,
        end_epoch=(start or 0.0) + draw(st.floats(0.1, 5)),
        cycle_epochs=draw(st.floats(0.1, 5)),
        param_groups=draw(groups),
    )


written = st.one_of(
    functions(),
    st.builds(EpochRangeModifier, start_epoch=st.just(0), end_epoch=epochs),
    st.builds(SetLearningRateModifier, learning_rate=rates, start_epoch=epochs, param_groups=groups),
    st.builds(SetWeightDecayModifier, weight_decay=rates, start_epoch=epochs),
    st.builds(
        DistillationModifier,
        start_epoch=epochs,
        hardness=rates,
        temperature=st.floats(0.1, 20),
        distill_output_keys=st.none() | st.lists(st.text("abc5e-: #'\n", min_size=1), min_size=1).map(tuple),
    ),
)


@settings(deadline=None)  # the machine may be busy
@given(written)
def test_a_recipe_that_is_written_down_reads_as_the_same_recipe(modifier: Modifier) -> None:
    recipe = Recipe((modifier,), places=("here",))
    again = Recipe.load(recipe.to_yaml())
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    assert again.warnings == []


def test_the_written_form_is_sparsemls() -> None:
    text = ranged("eval(n)", "n: 3") + "  - !SetLearningRateModifier {learning_rate: 5e-5}\n"
    assert Recipe.load(text).to_yaml() == (
        "version: 1.1.0\n"
        "modifiers:\n"
        "- !EpochRangeModifier\n"
        "  end_epoch: 3.0\n"
        "  start_epoch: 0.0\n"
        "- !SetLearningRateModifier\n"
        "  end_epoch: -1.0\n"
        "  learning_rate: 5.0e-05\n"
        "  start_epoch: -1.0\n"
    )


def test_the_written_form_keeps_flags_as_they_were_given() -> None:
    text = "m_modifiers:\n  - !QuantizationModifier {submodules: [bert.encoder], quantize_linear_activations: 0}\n"
    lines = Recipe.load(text).to_yaml().splitlines()
    assert "  quantize_linear_activations: 0" in lines
    assert "  quantize_embeddings: true" in lines
