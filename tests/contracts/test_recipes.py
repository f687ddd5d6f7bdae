"""What every shipped recipe promises: it loads in each way, plans, survives being written down, and trains as it did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedModel,
)

from sparse_accel.compress.plan import CompressionPlan, install
from sparse_accel.recipe import shipped
from sparse_accel.recipe.schema import Recipe
from tests import running
from tests.contracts import goldens
from tests.unit.qat_bert import bert, bert_config

RECIPES = running.ROOT / "recipes"
FILES = sorted(path for path in RECIPES.rglob("*") if path.is_file())

# A student of the task that a recipe's folder is named after.
STUDENTS: dict[str, Callable[[], PreTrainedModel]] = {
    "question_answering": bert,
    "text_classification": lambda: BertForSequenceClassification(bert_config()),
    "token_classification": lambda: BertForTokenClassification(bert_config()),
    "masked_language_modeling": lambda: BertForMaskedLM(bert_config()),
}
MODELS = {
    "question_answering": BertForQuestionAnswering,
    "text_classification": BertForSequenceClassification,
    "token_classification": BertForTokenClassification,
    "masked_language_modeling": BertForMaskedLM,
}

every_recipe = pytest.mark.parametrize("name", shipped.names())


def student_of(name: str) -> PreTrainedModel:
    return STUDENTS[goldens.task_of(name)]()


def test_every_file_under_recipes_is_shipped_and_has_a_golden() -> None:
    assert [path.relative_to(RECIPES).as_posix() for path in FILES] == [f"{name}.yaml" for name in shipped.names()]
    assert sorted(goldens.RUNS) == shipped.names()
    expected = {goldens.golden_file(name) for name in shipped.names()}
    assert set(goldens.FOLDER.iterdir()) == expected, "run python tests/contracts/regenerate_goldens.py"


@every_recipe
def test_a_recipe_is_the_same_by_name_by_file_and_as_text(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    by_name = Recipe.load(name)
    assert by_name.modifiers and by_name.warnings == []
    for source in (f"{name}.yaml", str(path), path.read_text("utf-8")):
        again = Recipe.load(source)
        assert (again, again.variables) == (by_name, by_name.variables)


@every_recipe
def test_a_recipe_can_be_carried_out_as_it_stands_and_as_it_is_shortened(name: str) -> None:
    for args in (None, goldens.RUNS[name].get("recipe_args")):
        recipe = Recipe.load(name, args)
        assert recipe.num_epochs is not None
        recipe.check(recipe.num_epochs)
        model, plan = student_of(name), CompressionPlan()
        recipe.plan(plan, model)
        install(model, plan)


@every_recipe
def test_every_variable_of_a_recipe_does_something(name: str) -> None:
    recipe = Recipe.load(name)
    for variable, value in recipe.variables.items():
        other = {0: 1, 1: 0}.get(value, value / 2)  # some are flags
        assert Recipe.load(name, {variable: other}) != recipe, variable


@every_recipe
def test_a_recipe_survives_being_written_down(name: str) -> None:
    recipe = Recipe.load(name, goldens.RUNS[name].get("recipe_args"))
    again = Recipe.load(recipe.to_yaml())
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    assert again.warnings == []


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {task: goldens.world(tmp_path_factory.mktemp(task), task) for task in goldens.WORLDS}


@every_recipe
def test_a_recipe_trains_as_its_golden_says(name: str, worlds: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Rates to 1e-9, zeros and phases exactly; losses to 1e-3, since processors add in different orders."""
    world = worlds[goldens.task_of(name)]
    traced = goldens.trace(name, world, tmp_path / "out")
    golden = goldens.golden_file(name).read_text("utf-8").splitlines()
    assert traced[0] == golden[0] == goldens.HEADER
    for ours, theirs in zip(traced[1:], golden[1:], strict=True):
        (step, loss, rate, *rest), (golden_step, golden_loss, golden_rate, *golden_rest) = ours.split(), theirs.split()
        assert (step, rest) == (golden_step, golden_rest), f"{ours}\n{theirs}"
        assert float(rate) == pytest.approx(float(golden_rate), rel=1e-9, abs=0), f"{ours}\n{theirs}"
        assert float(loss) == pytest.approx(float(golden_loss), rel=1e-3), f"{ours}\n{theirs}"
    _leaves_what_can_be_carried_on(name, world, tmp_path / "out")


def _leaves_what_can_be_carried_on(name: str, world: dict[str, Any], out: Path) -> None:
    """The folder's own recipe.yaml is the recipe that was run, and its plan is the one that the recipe makes."""
    recipe = Recipe.load(name, goldens.RUNS[name].get("recipe_args"))
    assert Recipe.load(str(out / "recipe.yaml")) == recipe
    student = MODELS[goldens.task_of(name)].from_pretrained(world["model_name_or_path"])
    plan = CompressionPlan()
    recipe.plan(plan, student)
    written = out / "compression_plan.json"
    assert written.exists() == bool(plan.modules)
    assert not plan.modules or CompressionPlan.load(written) == plan
